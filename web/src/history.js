/**
 * Conversations in the browser, one entry each, so that tabs do not overwrite each other's. Bounded: the
 * oldest go when there are too many or the browser has no more room.
 */
import { keep, readJson } from "./storage.js";

const PREFIX = "sluice.chat.";

export class History {
  #storage;
  #max;

  constructor(storage, max = 100) {
    this.#storage = storage;
    this.#max = max;
  }

  /** Newest first. What cannot be read is left out. */
  list() {
    return this.#keys()
      .map((key) => readJson(this.#storage, key))
      .filter(isConversation)
      .sort((a, b) => b.updated - a.updated);
  }

  /** False when there is no room for it, even alone. */
  save(conversation) {
    const key = PREFIX + conversation.id;
    const text = JSON.stringify(conversation);
    let isKept = keep(this.#storage, key, text);
    if (isKept && this.#keys().length <= this.#max) return true;
    const others = this.list().filter(({ id }) => id !== conversation.id);
    while (others.length && (!isKept || others.length >= this.#max)) {
      this.remove(others.pop().id);
      isKept ||= keep(this.#storage, key, text);
    }
    return isKept;
  }

  remove(id) {
    this.#storage.removeItem(PREFIX + id);
  }

  clear() {
    for (const key of this.#keys()) this.#storage.removeItem(key);
  }

  #keys() {
    return Array.from({ length: this.#storage.length }, (_, i) => this.#storage.key(i)).filter((key) =>
      key.startsWith(PREFIX),
    );
  }
}

export const isHistoryKey = (key) => key === null || key.startsWith(PREFIX);

function isConversation(found) {
  return found?.version === 1 && typeof found.id === "string" && Boolean(found.nodes && found.options);
}
