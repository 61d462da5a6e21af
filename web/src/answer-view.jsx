import { useState } from "preact/hooks";
import { describeStats } from "./answer.js";
import { CopyButton } from "./copy-button.jsx";
import { Icon } from "./icon.jsx";
import { Markdown } from "./markdown.jsx";
import { asCurl, asPython, requestFor } from "./request.js";
import { TokenView } from "./token-view.jsx";
import { Versions } from "./versions.jsx";

/** What the model said, thought, and how it ended; the same again, as tokens or as a command. */
export function AnswerView({ session, node, isBusy }) {
  const [showsTokens, setShowsTokens] = useState(false);
  const isRunning = node.status === "running";
  const tokens = isRunning ? [] : session.tokensOf(node.id);
  return (
    <article class="answer" aria-label={`Answer of ${node.options.model}`} aria-busy={isRunning}>
      {node.reasoning && <Reasoning text={node.reasoning} isRunning={isRunning && !node.content} />}
      {showsTokens && tokens.length ? <TokenView tokens={tokens} /> : <Markdown text={node.content} />}
      {isRunning && !node.content && !node.reasoning && <Waiting />}
      <Ending session={session} node={node} isBusy={isBusy} />
      {!isRunning && (
        <div class="actions">
          <Versions session={session} node={node} isBusy={isBusy} />
          <CopyButton text={() => node.content} label="Copy answer" />
          <button
            type="button"
            class="quiet"
            title="Answer again"
            aria-label="Answer again"
            disabled={isBusy}
            onClick={() => session.regenerate(node.id)}
          >
            <Icon name="again" />
          </button>
          {tokens.length > 0 && (
            <button
              type="button"
              class="quiet"
              title="Tokens and alternatives"
              aria-label="Tokens and alternatives"
              aria-pressed={showsTokens}
              onClick={() => setShowsTokens(!showsTokens)}
            >
              <Icon name="tokens" />
            </button>
          )}
          <CopyRequest session={session} node={node} />
          {node.stats && <span class="stats">{describeStats(node.stats)}</span>}
        </div>
      )}
    </article>
  );
}

function Waiting() {
  return (
    <div class="waiting">
      <span class="visually-hidden">Waiting for the first token</span>
      <i />
      <i />
      <i />
    </div>
  );
}

function Reasoning({ text, isRunning }) {
  return (
    <details class="reasoning">
      <summary>{isRunning ? "Thinking…" : "Thoughts"}</summary>
      <Markdown text={text} />
    </details>
  );
}

/** Why an answer is not whole, if it is not. */
function Ending({ session, node, isBusy }) {
  if (node.status === "failed") {
    return (
      <div class="notice error">
        <p>
          {node.error} {node.content && "What came before is kept."}
        </p>
        <button type="button" disabled={isBusy} onClick={() => session.regenerate(node.id)}>
          Try again
        </button>
      </div>
    );
  }
  if (node.status === "stopped") return <p class="remark">Stopped.</p>;
  if (node.finishReason === "length") return <p class="remark">Cut at the token limit.</p>;
  return null;
}

function CopyRequest({ session, node }) {
  const origin = new URL(".", document.baseURI).href;
  const write = (as) => () =>
    as(requestFor(session.state.conversation, node.parent, node.options), origin, Boolean(session.key));
  return (
    <>
      <CopyButton text={write(asCurl)} label="Copy this request as curl">
        curl
      </CopyButton>
      <CopyButton text={write(asPython)} label="Copy this request as Python">
        Python
      </CopyButton>
    </>
  );
}
