import { useState } from "preact/hooks";
import { copy } from "./clipboard.js";
import { Icon } from "./icon.jsx";

/** Copies what `text()` gives, and says that it has. */
export function CopyButton({ text, label, children }) {
  const [isCopied, setCopied] = useState(false);
  const onClick = async () => {
    await copy(text());
    setCopied(true);
    setTimeout(() => setCopied(false), 1500);
  };
  return (
    <button
      type="button"
      class="quiet"
      title={label}
      aria-label={isCopied ? "Copied" : label}
      onClick={onClick}
    >
      <Icon name={isCopied ? "check" : "copy"} />
      {children}
    </button>
  );
}
