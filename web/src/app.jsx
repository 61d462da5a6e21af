import { useEffect, useRef, useState } from "preact/hooks";
import { Composer } from "./composer.jsx";
import { Conversations } from "./conversations.jsx";
import { Dialog } from "./dialog.jsx";
import { useMedia, useSession } from "./hooks.js";
import { Icon } from "./icon.jsx";
import { KeyDialog } from "./key-dialog.jsx";
import { Settings } from "./settings.jsx";
import { Thread } from "./thread.jsx";
import { path } from "./tree.js";

const EXAMPLES = ["What is tensor parallelism?", "How does Sluice split a model?", "What is 7 plus 5?"];

export function App({ session }) {
  const state = useSession(session);
  const isWide = useMedia("(min-width: 860px)");
  const [drawer, setDrawer] = useState(""); // "", "conversations" or "settings"
  const [isKeyPutOff, setKeyPutOff] = useState(false);
  const input = useRef();
  const nodes = path(state.conversation);
  const isBusy = state.running !== null;
  const focusInput = () => input.current.focus();
  const closeDrawer = () => setDrawer("");
  const choose = () => {
    closeDrawer();
    requestAnimationFrame(focusInput);
  };

  useEffect(focusInput, []);
  useEffect(() => setKeyPutOff(false), [state.wantsKey]);
  useEffect(() => {
    const onKeyDown = (event) => {
      if (event.key !== "Escape" || document.querySelector("dialog[open]") || !session.state.running) return;
      session.stop();
      focusInput();
    };
    addEventListener("keydown", onKeyDown);
    return () => removeEventListener("keydown", onKeyDown);
  }, [session]);

  const conversations = <Conversations session={session} onChoose={choose} />;
  return (
    <div class="app">
      <a class="skip" href="#message">
        Skip to the message box
      </a>
      {isWide && (
        <aside class="side">
          <Brand />
          {conversations}
        </aside>
      )}
      <main>
        <header class="bar">
          {!isWide && (
            <button
              type="button"
              class="quiet"
              aria-label="Conversations"
              title="Conversations"
              onClick={() => setDrawer("conversations")}
            >
              <Icon name="menu" />
            </button>
          )}
          {!isWide && <h1 class="visually-hidden">Sluice</h1>}
          <ModelPicker session={session} />
          {!isWide && (
            <button
              type="button"
              class="quiet"
              aria-label="New conversation"
              title="New conversation"
              onClick={() => choose(session.startNew())}
            >
              <Icon name="plus" />
            </button>
          )}
          <button
            type="button"
            class="quiet"
            aria-label="Settings"
            title="Settings"
            onClick={() => setDrawer("settings")}
          >
            <Icon name="sliders" />
          </button>
        </header>
        {nodes.length ? (
          <Thread session={session} nodes={nodes} isBusy={isBusy} />
        ) : (
          <Welcome model={state.conversation.options.model} onChoose={(text) => choose(session.send(text))} />
        )}
        <div class="foot">
          {state.wantsKey && isKeyPutOff && (
            <div class="notice">
              <p>This server wants an API key.</p>
              <button type="button" onClick={() => setKeyPutOff(false)}>
                Enter the key
              </button>
            </div>
          )}
          {[state.serverStatus, state.notice].filter(Boolean).map((text) => (
            <p key={text} class="notice" role="status">
              {text}
            </p>
          ))}
          <Composer
            session={session}
            input={input}
            isBusy={isBusy}
            canSend={Boolean(state.conversation.options.model)}
            onSend={(text) => session.send(text)}
          />
        </div>
      </main>
      {drawer === "conversations" && !isWide && (
        <Dialog title="Sluice" className="drawer left" onClose={closeDrawer}>
          {conversations}
        </Dialog>
      )}
      {drawer === "settings" && <Settings session={session} onClose={closeDrawer} />}
      {state.wantsKey && !isKeyPutOff && <KeyDialog session={session} onClose={() => setKeyPutOff(true)} />}
      <div class="visually-hidden" role="status" aria-live="polite">
        {state.announcement}
      </div>
    </div>
  );
}

function Brand() {
  return (
    <h1 class="brand">
      <img src="page.svg" alt="" width={26} height={26} /> Sluice
    </h1>
  );
}

function ModelPicker({ session }) {
  const { models, conversation } = session.state;
  return (
    <select
      class="models"
      aria-label="Model"
      value={conversation.options.model}
      onChange={(event) => session.setOptions({ model: event.currentTarget.value })}
    >
      {models.length ? (
        models.map((name) => <option key={name}>{name}</option>)
      ) : (
        <option value="">No model yet</option>
      )}
    </select>
  );
}

function Welcome({ model, onChoose }) {
  return (
    <div class="welcome">
      <img src="page.svg" alt="" width={56} height={56} />
      <h2>{model ? `Ask ${model}` : "Connecting…"}</h2>
      <ul>
        {EXAMPLES.map((text) => (
          <li key={text}>
            <button type="button" disabled={!model} onClick={() => onChoose(text)}>
              {text}
            </button>
          </li>
        ))}
      </ul>
    </div>
  );
}
