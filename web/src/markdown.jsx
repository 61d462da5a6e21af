import { render } from "preact";
import { useLayoutEffect, useMemo, useRef } from "preact/hooks";
import { CopyButton } from "./copy-button.jsx";
import { toBlocks, toFragment } from "./markdown.js";

export function Markdown({ text }) {
  const blocks = useMemo(() => toBlocks(text), [text]);
  return (
    <div class="markdown">
      {blocks.map((html, index) => (
        <Block key={index} html={html} />
      ))}
    </div>
  );
}

/** Drawn anew only when its own HTML has changed: a selection in finished blocks stays while the rest comes. */
function Block({ html }) {
  const element = useRef();
  useLayoutEffect(() => {
    const fragment = toFragment(html);
    for (const table of fragment.querySelectorAll("table")) wrap(table, "table-box").tabIndex = 0;
    for (const pre of fragment.querySelectorAll("pre")) addHeader(pre);
    element.current.replaceChildren(fragment);
  }, [html]);
  return <div ref={element} />;
}

function addHeader(pre) {
  const box = wrap(pre, "code-box");
  const header = document.createElement("div");
  header.className = "code-header";
  render(
    <>
      <span>{pre.title || "text"}</span>
      <CopyButton text={() => pre.textContent} label="Copy code" />
    </>,
    header,
  );
  box.prepend(header);
  pre.tabIndex = 0; // it may scroll
  pre.removeAttribute("title");
}

function wrap(element, className) {
  const box = document.createElement("div");
  box.className = className;
  element.replaceWith(box);
  box.append(element);
  return box;
}
