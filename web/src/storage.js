/** localStorage and sessionStorage, which may be full, switched off, or hold what we did not write. */

/** For a browser that keeps nothing: as localStorage, until the page is closed. */
export class MemoryStorage {
  #items = new Map();
  get length() {
    return this.#items.size;
  }
  key(index) {
    return [...this.#items.keys()][index] ?? null;
  }
  getItem(key) {
    return this.#items.get(key) ?? null;
  }
  setItem(key, value) {
    this.#items.set(key, String(value));
  }
  removeItem(key) {
    this.#items.delete(key);
  }
}

/** False when there is no room. */
export function keep(storage, key, value) {
  try {
    storage.setItem(key, value);
    return true;
  } catch {
    return false;
  }
}

/** Null where there is none, or it is damaged. */
export function readJson(storage, key) {
  try {
    return JSON.parse(storage.getItem(key));
  } catch {
    return null;
  }
}

/** `name` is "localStorage" or "sessionStorage"; browsers that keep nothing throw when it is touched. */
export function storageOf(name) {
  try {
    const storage = globalThis[name];
    storage.getItem("");
    return storage;
  } catch {
    return new MemoryStorage();
  }
}
