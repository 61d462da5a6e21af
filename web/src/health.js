/** What keeps the server from answering, from what /readyz says (null: nobody answers); "" if nothing does. */
export function describeHealth(health) {
  if (health === null) return "The server does not answer. Trying again…";
  if (health.status === "ready") return "";
  if (health.status === "draining") return "The server is shutting down and takes no new requests.";
  const loading = health.models
    .filter(({ ready }) => !ready)
    .map(({ model, groups: [group] }) => {
      if (group?.state === "failed") return `${model} could not be started; the server's log says why.`;
      const progress = group?.percent ? ` (${group.phase}, ${group.percent} %)` : "";
      return `${model} is loading${progress}.`;
    });
  return loading.join(" ");
}
