import { useRef, useState } from "preact/hooks";
import { alternativesOf, doubtOf, percentOf, tokenLabel } from "./token.js";

const STEPS = { ArrowRight: 1, ArrowLeft: -1 };

/** An answer token by token, coloured by how sure the model was; one of them with what else it could have been. */
export function TokenView({ tokens }) {
  const [chosen, setChosen] = useState(0);
  const list = useRef();
  const onKeyDown = (event) => {
    const next = chosen + (STEPS[event.key] ?? 0);
    if (next === chosen || !tokens[next]) return;
    event.preventDefault();
    setChosen(next);
    list.current.children[next].focus();
  };
  return (
    <section class="token-view" aria-label="Tokens and their alternatives">
      <div class="tokens" role="group" aria-label="Tokens; arrow keys move" ref={list} onKeyDown={onKeyDown}>
        {tokens.map((token, index) => (
          <button
            type="button"
            key={index}
            class={`token doubt-${doubtOf(token.logprob)}`}
            aria-pressed={index === chosen}
            aria-label={`${tokenLabel(token)}, ${percentOf(token.logprob)}`}
            tabIndex={index === chosen ? 0 : -1}
            onClick={() => setChosen(index)}
          >
            {tokenLabel(token)}
          </button>
        ))}
      </div>
      <Alternatives token={tokens[chosen]} />
    </section>
  );
}

function Alternatives({ token }) {
  return (
    <table class="alternatives" aria-live="polite">
      <caption>Instead of “{tokenLabel(token)}”</caption>
      <tbody>
        {alternativesOf(token).map((one) => (
          <tr key={tokenLabel(one)} class={one.isDrawn ? "drawn" : ""}>
            <th scope="row">
              <code>{tokenLabel(one)}</code>
              {one.isDrawn && <span class="visually-hidden">, the one that was drawn</span>}
            </th>
            <td>
              <progress max={1} value={Math.exp(one.logprob)} aria-hidden="true" />
            </td>
            <td class="number">{percentOf(one.logprob)}</td>
          </tr>
        ))}
      </tbody>
    </table>
  );
}
