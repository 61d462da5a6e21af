/**
 * A conversation is a tree of messages: to edit one or to ask again adds a sibling, so nothing is ever
 * overwritten. What is shown is the path from the root to `leaf`. Values are never changed in place.
 */
export const newId = () => `n${Math.random().toString(36).slice(2, 12)}`; // randomUUID wants HTTPS

export function newConversation(options) {
  return { version: 1, id: newId(), title: "", updated: 0, options, nodes: {}, leaf: null };
}

/** The messages that are shown, first to last. */
export function path(conversation) {
  return pathTo(conversation, conversation.leaf);
}

export function pathTo({ nodes }, id) {
  const found = [];
  for (let node = nodes[id]; node; node = nodes[node.parent]) found.unshift(node);
  return found;
}

/** With a new message under `parent` (null: a new start), which is shown. */
export function append(conversation, parent, message) {
  const node = { id: newId(), parent, ...message };
  return { ...conversation, nodes: { ...conversation.nodes, [node.id]: node }, leaf: node.id };
}

export function change(conversation, id, fields) {
  const node = { ...conversation.nodes[id], ...fields };
  return { ...conversation, nodes: { ...conversation.nodes, [id]: node } };
}

/** Without a message that nothing follows. */
export function removeLeaf(conversation, id) {
  const { [id]: gone, ...nodes } = conversation.nodes;
  return { ...conversation, nodes, leaf: conversation.leaf === id ? gone.parent : conversation.leaf };
}

/** The versions of a message, oldest first, itself among them. */
export function versions(conversation, id) {
  const { parent } = conversation.nodes[id];
  return Object.values(conversation.nodes).filter((node) => node.parent === parent);
}

/** Shows the path through this message, with the newest of what follows it. */
export function show(conversation, id) {
  const nodes = Object.values(conversation.nodes);
  let leaf = id;
  for (let next = id; next; next = nodes.findLast((node) => node.parent === leaf)?.id) leaf = next;
  return { ...conversation, leaf };
}
