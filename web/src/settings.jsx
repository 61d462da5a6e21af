import { useState } from "preact/hooks";
import { Dialog } from "./dialog.jsx";
import { NUMBERS, problemOf } from "./request.js";
import { setTheme, theme, THEMES } from "./theme.js";

/** What goes with each request of this conversation, and how the page looks. */
export function Settings({ session, onClose }) {
  const { options } = session.state.conversation;
  return (
    <Dialog title="Settings" className="drawer right" onClose={onClose}>
      <label class="field">
        System prompt
        <textarea
          rows={4}
          value={options.system}
          placeholder="Instructions for the model"
          onInput={(event) => session.setOptions({ system: event.currentTarget.value })}
        />
      </label>
      <div class="numbers">
        {NUMBERS.map((field) => (
          <NumberField
            key={field.name}
            field={field}
            text={options[field.name] ?? ""}
            onInput={(text) => session.setOptions({ [field.name]: text })}
          />
        ))}
      </div>
      <p class="hint">An empty field leaves the choice to the server.</p>
      <label class="check">
        <input
          type="checkbox"
          checked={options.logprobs}
          onChange={(event) => session.setOptions({ logprobs: event.currentTarget.checked })}
        />
        <span>
          Token probabilities
          <small>Answers can be looked at token by token, with alternatives.</small>
        </span>
      </label>
      <Theme />
      {session.key && (
        <button type="button" onClick={() => onClose(session.setKey(""))}>
          Forget the API key
        </button>
      )}
    </Dialog>
  );
}

function NumberField({ field, text, onInput }) {
  const problem = problemOf(field, text);
  const id = `problem-${field.name}`;
  return (
    <label class="field">
      {field.label}
      <input
        type="text"
        inputMode="decimal"
        autocomplete="off"
        placeholder="default"
        value={text}
        aria-invalid={Boolean(problem)}
        aria-describedby={id}
        onInput={(event) => onInput(event.currentTarget.value)}
      />
      <small id={id} class="problem" role="status">
        {problem && `${problem} It is not sent.`}
      </small>
    </label>
  );
}

function Theme() {
  const [chosen, setChosen] = useState(theme());
  const choose = (name) => {
    setTheme(name);
    setChosen(name);
  };
  return (
    <fieldset class="segments">
      <legend>Appearance</legend>
      {Object.entries(THEMES).map(([name, label]) => (
        <label key={name}>
          <input type="radio" name="theme" checked={chosen === name} onChange={() => choose(name)} />
          <span>{label}</span>
        </label>
      ))}
    </fieldset>
  );
}
