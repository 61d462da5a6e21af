import assert from "node:assert/strict";
import { test } from "node:test";
import { History } from "../src/history.js";
import { MemoryStorage } from "../src/storage.js";

/** Storage with room for `room` characters. */
class SmallStorage extends MemoryStorage {
  constructor(room) {
    super();
    this.room = room;
  }
  setItem(key, value) {
    const others = Array.from({ length: this.length }, (_, i) => this.key(i)).filter((one) => one !== key);
    const used = others.reduce((sum, one) => sum + one.length + this.getItem(one).length, 0);
    if (used + key.length + value.length > this.room) throw new DOMException("full", "QuotaExceededError");
    super.setItem(key, value);
  }
}

const conversation = (id, updated, text = "") => ({ version: 1, id, updated, options: {}, nodes: { text } });
const ids = (history) => history.list().map(({ id }) => id);

test("newest first; saving again replaces", () => {
  const history = new History(new MemoryStorage());
  for (const [id, at] of [
    ["a", 1],
    ["b", 3],
    ["c", 2],
    ["a", 4],
  ])
    assert.ok(history.save(conversation(id, at)));
  assert.deepEqual(ids(history), ["a", "b", "c"]);
});

test("the oldest go when there are too many", () => {
  const history = new History(new MemoryStorage(), 3);
  for (let i = 0; i < 10; i++) history.save(conversation(`c${i}`, i));
  assert.deepEqual(ids(history), ["c9", "c8", "c7"]);
  history.save(conversation("old", 0));
  assert.deepEqual(ids(history), ["c9", "c8", "old"]); // what is saved now is never what goes
});

test("the oldest go when there is no more room, as many as need be", () => {
  const history = new History(new SmallStorage(1000));
  for (let i = 0; i < 5; i++) assert.ok(history.save(conversation(`c${i}`, i, "x".repeat(100))));
  assert.ok(history.save(conversation("large", 9, "x".repeat(500))));
  assert.deepEqual(ids(history), ["large", "c4", "c3"]);
});

test("what has no room even alone is not kept, and said so", () => {
  const history = new History(new SmallStorage(1000));
  assert.equal(history.save(conversation("huge", 1, "x".repeat(2000))), false);
});

test("other entries stay, damaged ones are passed over", () => {
  const storage = new MemoryStorage();
  storage.setItem("other", "kept");
  storage.setItem("sluice.chat.bad", "{");
  storage.setItem("sluice.chat.null", "null");
  storage.setItem("sluice.chat.new", '{"version":2}');
  const history = new History(storage);
  history.save(conversation("a", 1));
  assert.deepEqual(ids(history), ["a"]);
  history.remove("a");
  assert.deepEqual(ids(history), []);
  history.clear();
  assert.equal(storage.length, 1);
});
