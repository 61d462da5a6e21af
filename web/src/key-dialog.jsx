import { useRef } from "preact/hooks";
import { Dialog } from "./dialog.jsx";

export function KeyDialog({ session, onClose }) {
  const input = useRef();
  const submit = (event) => {
    event.preventDefault();
    session.setKey(input.current.value.trim());
  };
  return (
    <Dialog title="API key" onClose={onClose}>
      <form onSubmit={submit}>
        <p>
          {session.key
            ? "The server does not accept the key that it was given."
            : "This server wants an API key."}{" "}
          It is kept until this tab is closed.
        </p>
        <label class="field">
          API key
          <input ref={input} type="password" autocomplete="off" required autofocus />
        </label>
        <div class="buttons">
          <button type="submit" class="primary">
            Use this key
          </button>
        </div>
      </form>
    </Dialog>
  );
}
