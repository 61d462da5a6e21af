/** What the page knows and can do: conversations, the one that is shown, and the answer that is running. */
import { Answer } from "./answer.js";
import { listModels, readiness, streamChat } from "./api.js";
import { describeHealth } from "./health.js";
import { isHistoryKey } from "./history.js";
import { DEFAULT_OPTIONS, requestFor } from "./request.js";
import { soon } from "./soon.js";
import { keep, readJson } from "./storage.js";
import { append, change, newConversation, path, removeLeaf, show } from "./tree.js";

const SHOW_MS = 40; // between two views of an answer that is being written
const SAVE_MS = 2000;
const POLL_MS = 2000;
const KEY = "sluice.key";
const OPTIONS = "sluice.options";
const DRAFT = "sluice.draft";

export class Session {
  #history;
  #local;
  #tab; // storage that ends with the tab
  #base; // of the API's addresses
  #listeners = new Set();
  #tokens = new Map(); // of this visit's answers, by message: too large to keep
  #polling = false;
  #savingOptions = soon(SHOW_MS, () => this.#saveOptions());

  state;

  constructor(history, local, tab, base = "") {
    this.#history = history;
    this.#local = local;
    this.#tab = tab;
    this.#base = base;
    const options = { ...DEFAULT_OPTIONS, ...readJson(local, OPTIONS) };
    this.state = {
      conversations: history.list().map(interrupted),
      conversation: newConversation(options),
      models: [],
      running: null, // { conversation, node, controller }
      wantsKey: false,
      serverStatus: "", // what keeps the server from answering
      notice: "", // what the user should know
      announcement: "", // for screen readers
    };
  }

  subscribe(listener) {
    this.#listeners.add(listener);
    return () => this.#listeners.delete(listener);
  }

  #set(fields) {
    this.state = { ...this.state, ...fields };
    for (const listener of this.#listeners) listener();
  }

  // The server

  get key() {
    return this.#tab.getItem(KEY) ?? "";
  }

  async start() {
    this.#poll();
    await this.#loadModels();
  }

  setKey(key) {
    keep(this.#tab, KEY, key);
    this.#set({ wantsKey: false });
    return this.#loadModels();
  }

  async #loadModels() {
    try {
      const models = await listModels({ base: this.#base, key: this.key });
      this.#set({ models });
      if (!models.includes(this.state.conversation.options.model))
        this.setOptions({ model: models[0] ?? "" });
    } catch (error) {
      if (error.status === 401) this.#set({ wantsKey: true });
      else this.#set({ serverStatus: error.message });
    }
  }

  /** Until the server is ready, say why it is not. */
  async #poll() {
    if (this.#polling) return;
    this.#polling = true;
    while (true) {
      const health = await readiness({ base: this.#base });
      this.#set({ serverStatus: describeHealth(health) });
      if (health?.status === "ready") break;
      await new Promise((resolve) => setTimeout(resolve, POLL_MS));
    }
    this.#polling = false;
    if (!this.state.models.length && !this.state.wantsKey) await this.#loadModels();
  }

  // Conversations

  startNew() {
    if (path(this.state.conversation).length) this.#show(newConversation(this.state.conversation.options));
  }

  open(id) {
    const found = this.state.conversations.find((conversation) => conversation.id === id);
    if (found) this.#show(found);
  }

  #show(conversation) {
    const { models } = this.state;
    const isServed = !models.length || models.includes(conversation.options.model);
    const options = isServed ? conversation.options : { ...conversation.options, model: models[0] };
    this.#set({ conversation: { ...conversation, options }, notice: "" });
  }

  remove(id) {
    if (this.state.running?.conversation === id) this.stop();
    this.#history.remove(id);
    const conversations = this.state.conversations.filter((conversation) => conversation.id !== id);
    this.#set({ conversations, announcement: "Conversation deleted." });
    if (this.state.conversation.id === id)
      this.#set({ conversation: newConversation(this.state.conversation.options) });
  }

  removeAll() {
    this.stop();
    this.#history.clear();
    this.#set({
      conversations: [],
      conversation: newConversation(this.state.conversation.options),
      announcement: "All conversations deleted.",
    });
  }

  /** What another tab has changed. The conversation that is running here stays as it is here. */
  refresh(key) {
    if (!isHistoryKey(key)) return;
    const isOurs = ({ id }) => id === this.state.running?.conversation;
    const ours = this.state.conversations.filter(isOurs);
    const conversations = sorted([...ours, ...this.#history.list().filter((one) => !isOurs(one))]);
    const shown = conversations.find(({ id }) => id === this.state.conversation.id);
    this.#set({ conversations, conversation: shown ?? this.state.conversation });
  }

  setOptions(fields) {
    const options = { ...this.state.conversation.options, ...fields };
    this.#put({ ...this.state.conversation, options });
    this.#savingOptions.request();
  }

  #saveOptions() {
    this.#save(this.state.conversation.id);
    keep(this.#local, OPTIONS, JSON.stringify(this.state.conversation.options));
  }

  get draft() {
    return this.#tab.getItem(DRAFT) ?? "";
  }

  set draft(text) {
    keep(this.#tab, DRAFT, text);
  }

  tokensOf(id) {
    return this.#tokens.get(id) ?? [];
  }

  showVersion(id) {
    this.#put(show(this.state.conversation, id));
    this.#save(this.state.conversation.id);
  }

  #get(id) {
    const { conversation, conversations } = this.state;
    return conversation.id === id ? conversation : conversations.find((one) => one.id === id);
  }

  /** Replaces a conversation wherever it is; it enters the list with its first message. */
  #put(conversation) {
    const others = this.state.conversations.filter(({ id }) => id !== conversation.id);
    const fields = conversation.leaf ? { conversations: sorted([conversation, ...others]) } : {};
    if (this.state.conversation.id === conversation.id) fields.conversation = conversation;
    this.#set(fields);
  }

  #save(id) {
    const conversation = this.#get(id);
    if (!conversation?.leaf || this.#history.save(conversation)) return;
    this.#set({
      notice: "The browser has no room left: this conversation is not saved. Delete others to keep it.",
    });
  }

  /** Before the page goes away. */
  flush() {
    this.#savingOptions.flush();
    if (this.state.running) this.#save(this.state.running.conversation);
  }

  // Asking

  /** A new message after what is shown, or in the place of one that is edited. */
  send(text, { insteadOf = null } = {}) {
    const { conversation } = this.state;
    const parent = insteadOf ? conversation.nodes[insteadOf].parent : conversation.leaf;
    const asked = append(conversation, parent, { role: "user", content: text });
    const title = conversation.title || text.trim().split("\n")[0].slice(0, 80);
    this.#put({ ...asked, title, updated: Date.now() });
    return this.#answer(asked.leaf);
  }

  /** Another answer to the same message; in the place of one that never began. */
  regenerate(id) {
    const { conversation } = this.state;
    const { parent, content, reasoning } = conversation.nodes[id];
    if (!content && !reasoning) this.#put(removeLeaf(conversation, id));
    return this.#answer(parent);
  }

  stop() {
    this.state.running?.controller.abort();
  }

  async #answer(parent) {
    this.stop();
    const { options, id } = this.state.conversation;
    const body = requestFor(this.state.conversation, parent, options);
    const empty = { role: "assistant", content: "", reasoning: "", options, status: "running" };
    const asked = append(this.state.conversation, parent, empty);
    const running = { conversation: id, node: asked.leaf, controller: new AbortController() };
    this.#put(asked);
    this.#save(id);
    this.#set({ running, notice: "", announcement: "Answering." });
    await this.#receive(running, body);
  }

  async #receive({ conversation, node, controller }, body) {
    const { signal } = controller;
    const answer = new Answer(performance.now());
    const streamed = {
      ...body,
      stream: true,
      stream_options: { include_usage: true, continuous_usage_stats: true },
    };
    const showing = soon(SHOW_MS, () => this.#update(conversation, node, answer));
    const saving = soon(SAVE_MS, () => this.#save(conversation));
    let outcome = { status: "done" };
    try {
      for await (const chunk of streamChat(streamed, { base: this.#base, key: this.key, signal })) {
        answer.take(chunk, performance.now());
        showing.request();
        saving.request();
      }
    } catch (error) {
      outcome = this.#outcomeOf(error, signal);
    }
    showing.cancel();
    saving.cancel();
    this.#tokens.set(node, answer.tokens);
    this.#update(conversation, node, answer, outcome);
    this.#save(conversation);
    const said = answer.content.slice(0, 2000);
    const ending = { done: "Answer finished:", stopped: "Stopped:", failed: `${outcome.error} So far:` }[
      outcome.status
    ];
    if (this.state.running?.node === node) this.#set({ running: null, announcement: `${ending} ${said}` });
  }

  #outcomeOf(error, signal) {
    if (signal.aborted) return { status: "stopped" };
    if (error.status === 401) this.#set({ wantsKey: true });
    if (error.status === 503 || ["unreachable", "cut"].includes(error.kind)) this.#poll();
    return { status: "failed", error: error.message };
  }

  #update(id, node, answer, outcome = {}) {
    const conversation = this.#get(id);
    if (!conversation?.nodes[node]) return; // deleted meanwhile
    const { content, reasoning, stats, finishReason } = answer;
    this.#put(change(conversation, node, { content, reasoning, stats, finishReason, ...outcome }));
  }
}

const sorted = (conversations) => conversations.toSorted((a, b) => b.updated - a.updated);

/** Answers that ran when their page was closed have not ended any other way. */
function interrupted(conversation) {
  const nodes = Object.entries(conversation.nodes).map(([id, node]) =>
    node.status === "running"
      ? [id, { ...node, status: "failed", error: "The page was closed before the answer was complete." }]
      : [id, node],
  );
  return { ...conversation, nodes: Object.fromEntries(nodes) };
}
