import { render } from "preact";
import { App } from "./app.jsx";
import { History } from "./history.js";
import { Session } from "./session.js";
import { storageOf } from "./storage.js";
import "./style.css";
import { followTheme } from "./theme.js";

followTheme(); // before the first paint: the script is in the head

document.addEventListener("DOMContentLoaded", () => {
  const local = storageOf("localStorage");
  const session = new Session(new History(local), local, storageOf("sessionStorage"));
  addEventListener("pagehide", () => session.flush());
  addEventListener("storage", (event) => session.refresh(event.key));
  render(<App session={session} />, document.body);
  session.start();
});
