import { Icon } from "./icon.jsx";

/** The conversations that the browser keeps, newest first. */
export function Conversations({ session, onChoose }) {
  const { conversations, conversation, running } = session.state;
  const act = (work) => () => {
    work();
    onChoose();
  };
  return (
    <nav class="conversations" aria-label="Conversations">
      <button type="button" class="new" onClick={act(() => session.startNew())}>
        <Icon name="plus" /> New conversation
      </button>
      <ul>
        {conversations.map(({ id, title }) => (
          <li key={id} class={id === conversation.id ? "current" : ""}>
            <button
              type="button"
              class="open"
              title={title}
              aria-current={id === conversation.id ? "true" : undefined}
              onClick={act(() => session.open(id))}
            >
              {running?.conversation === id && <span class="dot" role="img" aria-label="Answering" />}
              {title || "Untitled"}
            </button>
            <button
              type="button"
              class="quiet"
              title="Delete"
              aria-label={`Delete “${title}”`}
              onClick={() => session.remove(id)}
            >
              <Icon name="trash" />
            </button>
          </li>
        ))}
      </ul>
      {conversations.length > 1 && (
        <button
          type="button"
          class="quiet wide"
          onClick={() => confirm("Delete all conversations?") && session.removeAll()}
        >
          Delete all
        </button>
      )}
      <p class="hint">Kept in this browser only.</p>
    </nav>
  );
}
