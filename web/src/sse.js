/** Server-sent events from bytes that may be cut anywhere, within a character too. */
export class EventParser {
  #decoder = new TextDecoder();
  #rest = "";
  #data = [];

  /** The data of each event that `bytes` completes. */
  push(bytes) {
    const text = this.#rest + this.#decoder.decode(bytes, { stream: true });
    // The other half of a \r\n may be still to come.
    const end = text.endsWith("\r") ? text.length - 1 : text.length;
    const lines = text.slice(0, end).split(/\r\n|\r|\n/);
    this.#rest = lines.pop() + text.slice(end);
    return lines.flatMap((line) => this.#take(line));
  }

  #take(line) {
    if (line === "") {
      const data = this.#data;
      this.#data = [];
      return data.length ? [data.join("\n")] : [];
    }
    const [, name, value] = /^([^:]*)(?:: ?)?(.*)$/s.exec(line);
    if (name === "data") this.#data.push(value);
    return [];
  }
}
