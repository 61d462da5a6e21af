import { Icon } from "./icon.jsx";
import { versions } from "./tree.js";

/** Goes from one version of a message to another, where there are several. */
export function Versions({ session, node, isBusy }) {
  const all = versions(session.state.conversation, node.id);
  if (all.length < 2) return null;
  const at = all.indexOf(node);
  const go = (step, label, icon) => (
    <button
      type="button"
      class="quiet"
      aria-label={label}
      title={label}
      disabled={isBusy || !all[at + step]}
      onClick={() => session.showVersion(all[at + step].id)}
    >
      <Icon name={icon} />
    </button>
  );
  return (
    <span class="versions" role="group" aria-label="Versions">
      {go(-1, "Previous version", "left")}
      <span>
        {at + 1}/{all.length}
      </span>
      {go(1, "Next version", "right")}
    </span>
  );
}
