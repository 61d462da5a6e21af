import assert from "node:assert/strict";
import { test } from "node:test";
import { append, change, newConversation, path, removeLeaf, show, versions } from "../src/tree.js";

const say = (conversation, content, parent = conversation.leaf) => append(conversation, parent, { content });
const texts = (conversation) => path(conversation).map(({ content }) => content);
const idOf = ({ nodes }, content) => Object.values(nodes).find((node) => node.content === content).id;

function talk() {
  return ["q1", "a1", "q2", "a2"].reduce(
    (conversation, content) => say(conversation, content),
    newConversation({}),
  );
}

test("what is shown is a path", () => {
  assert.deepEqual(texts(newConversation({})), []);
  assert.deepEqual(texts(talk()), ["q1", "a1", "q2", "a2"]);
});

test("an edit adds a version and loses nothing", () => {
  const before = talk();
  const edited = say(before, "q2 edited", idOf(before, "a1"));
  assert.deepEqual(texts(edited), ["q1", "a1", "q2 edited"]);
  const all = versions(edited, edited.leaf);
  assert.deepEqual(
    all.map(({ content }) => content),
    ["q2", "q2 edited"],
  );
  assert.deepEqual(texts(show(edited, all[0].id)), ["q1", "a1", "q2", "a2"]);
  assert.deepEqual(texts(before), ["q1", "a1", "q2", "a2"]);
});

test("the first message has versions too", () => {
  const edited = say(talk(), "q1 edited", null);
  assert.deepEqual(texts(edited), ["q1 edited"]);
  assert.equal(versions(edited, edited.leaf).length, 2);
});

test("an old version shows the newest of what follows it", () => {
  let conversation = talk();
  conversation = say(conversation, "a2 again", idOf(conversation, "q2"));
  conversation = say(conversation, "q1 edited", null);
  assert.deepEqual(texts(show(conversation, idOf(conversation, "q1"))), ["q1", "a1", "q2", "a2 again"]);
});

test("changes leave older values as they were", () => {
  const before = talk();
  const after = change(before, before.leaf, { content: "changed" });
  assert.deepEqual(texts(before).at(-1), "a2");
  assert.deepEqual(texts(after).at(-1), "changed");
  assert.deepEqual(texts(removeLeaf(before, before.leaf)), ["q1", "a1", "q2"]);
});

test("the order of versions survives storage", () => {
  let conversation = talk();
  for (let i = 0; i < 20; i++) conversation = say(conversation, `v${i}`, null);
  const kept = JSON.parse(JSON.stringify(conversation));
  assert.deepEqual(
    versions(kept, kept.leaf).map(({ content }) => content),
    ["q1", ...Array.from({ length: 20 }, (_, i) => `v${i}`)],
  );
});
