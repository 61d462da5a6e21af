import { useEffect, useRef } from "preact/hooks";
import { Icon } from "./icon.jsx";

/** The browser's own modal dialog: it keeps the focus, Escape closes it, and the focus goes back after. */
export function Dialog({ title, className = "", onClose, children }) {
  const dialog = useRef();
  useEffect(() => {
    const element = dialog.current;
    element.showModal();
    return () => element.close(); // gives the focus back
  }, []);
  const onClick = (event) => event.target === dialog.current && dialog.current.close();
  return (
    <dialog ref={dialog} class={className} aria-label={title} onClose={onClose} onClick={onClick}>
      <div class="dialog-content">
        <header>
          <h2>{title}</h2>
          <button
            type="button"
            class="quiet"
            aria-label="Close"
            title="Close (Esc)"
            onClick={() => dialog.current.close()}
          >
            <Icon name="close" />
          </button>
        </header>
        {children}
      </div>
    </dialog>
  );
}
