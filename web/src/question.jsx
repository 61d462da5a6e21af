import { useLayoutEffect, useRef, useState } from "preact/hooks";
import { CopyButton } from "./copy-button.jsx";
import { Icon } from "./icon.jsx";
import { Versions } from "./versions.jsx";

/** What the user said; it can be edited, which asks again. */
export function Question({ session, node, isBusy }) {
  const [isEditing, setEditing] = useState(false);
  const edit = useRef();
  const finish = (text) => {
    setEditing(false);
    if (text !== undefined) session.send(text, { insteadOf: node.id });
    else requestAnimationFrame(() => edit.current?.focus());
  };
  return (
    <article class="question" aria-label="You">
      {isEditing ? (
        <Editor text={node.content} onFinish={finish} />
      ) : (
        <div class="bubble">{node.content}</div>
      )}
      {!isEditing && (
        <div class="actions">
          <Versions session={session} node={node} isBusy={isBusy} />
          <CopyButton text={() => node.content} label="Copy message" />
          <button
            type="button"
            class="quiet"
            ref={edit}
            title="Edit message"
            aria-label="Edit message"
            disabled={isBusy}
            onClick={() => setEditing(true)}
          >
            <Icon name="edit" />
          </button>
        </div>
      )}
    </article>
  );
}

function Editor({ text, onFinish }) {
  const area = useRef();
  useLayoutEffect(() => {
    area.current.focus();
    area.current.setSelectionRange(text.length, text.length);
  }, []);
  const submit = () => area.current.value.trim() && onFinish(area.current.value);
  const onKeyDown = (event) => {
    if (event.key === "Escape") onFinish();
    else if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    else submit();
    event.preventDefault();
    event.stopPropagation();
  };
  return (
    <div class="editor">
      <textarea
        ref={area}
        aria-label="Edit message"
        defaultValue={text}
        rows={Math.min(12, text.split("\n").length + 1)}
        onKeyDown={onKeyDown}
      />
      <div class="buttons">
        <button type="button" onClick={() => onFinish()}>
          Cancel
        </button>
        <button type="button" class="primary" onClick={submit}>
          Send
        </button>
      </div>
    </div>
  );
}
