import { useLayoutEffect, useRef, useState } from "preact/hooks";
import { useMedia } from "./hooks.js";
import { Icon } from "./icon.jsx";

/** Where messages are written. What is typed stays until it is sent, over a reload too. */
export function Composer({ session, input, isBusy, canSend, onSend }) {
  const [text, setText] = useState(session.draft);
  const hasKeyboard = !useMedia("(pointer: coarse)");
  const ready = canSend && !isBusy && text.trim() !== "";
  useLayoutEffect(() => fit(input.current), [text]);

  const change = (value) => {
    setText(value);
    session.draft = value;
  };
  const submit = (event) => {
    event.preventDefault();
    if (!ready) return;
    onSend(text);
    change("");
    input.current.focus();
  };
  const onKeyDown = (event) => {
    if (event.key === "Enter" && hasKeyboard && !event.shiftKey && !event.isComposing) submit(event);
  };
  return (
    <form class="composer" aria-label="New message" onSubmit={submit}>
      <textarea
        id="message"
        ref={input}
        rows={1}
        aria-label="Message"
        aria-describedby="keys"
        placeholder="Ask something"
        value={text}
        onInput={(event) => change(event.currentTarget.value)}
        onKeyDown={onKeyDown}
      />
      {isBusy ? (
        <button
          type="button"
          class="round"
          title="Stop (Esc)"
          aria-label="Stop"
          onClick={() => session.stop()}
        >
          <Icon name="stop" />
        </button>
      ) : (
        <button type="submit" class="round" title="Send (Enter)" aria-label="Send" disabled={!ready}>
          <Icon name="send" />
        </button>
      )}
      <p id="keys" class="visually-hidden">
        {hasKeyboard && "Enter sends, Shift and Enter begins a new line."} Escape stops an answer.
      </p>
    </form>
  );
}

/** As high as its text; style.css has the limit. */
function fit(area) {
  area.style.height = "auto";
  area.style.height = `${area.scrollHeight}px`;
}
