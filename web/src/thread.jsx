import { useEffect, useLayoutEffect, useRef, useState } from "preact/hooks";
import { AnswerView } from "./answer-view.jsx";
import { Icon } from "./icon.jsx";
import { Question } from "./question.jsx";

const NEAR = 60; // pixels from the end that count as the end

/** The messages. It follows an answer that is being written unless the reader has scrolled away. */
export function Thread({ session, nodes, isBusy }) {
  const box = useRef();
  const follows = useRef(true);
  const [isAway, setAway] = useState(false);
  const toEnd = () => box.current.scrollTo({ top: box.current.scrollHeight });
  const onScroll = () => {
    const { scrollTop, scrollHeight, clientHeight } = box.current;
    follows.current = scrollHeight - scrollTop - clientHeight < NEAR;
    setAway(!follows.current);
  };
  useLayoutEffect(() => {
    if (follows.current) toEnd();
  });
  const numQuestions = nodes.filter(({ role }) => role === "user").length;
  useEffect(() => {
    follows.current = true;
    toEnd();
  }, [session.state.conversation.id, numQuestions]);
  return (
    <div class="thread-box">
      <div class="thread" ref={box} onScroll={onScroll} tabIndex={0} role="region" aria-label="Conversation">
        <ol>
          {nodes.map((node) => (
            <li key={node.id}>
              {node.role === "user" ? (
                <Question session={session} node={node} isBusy={isBusy} />
              ) : (
                <AnswerView session={session} node={node} isBusy={isBusy} />
              )}
            </li>
          ))}
        </ol>
      </div>
      {isAway && (
        <button type="button" class="to-end" aria-label="To the end" title="To the end" onClick={toEnd}>
          <Icon name="down" />
        </button>
      )}
    </div>
  );
}
