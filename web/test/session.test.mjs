import assert from "node:assert/strict";
import { createServer } from "node:http";
import { after, before, beforeEach, test } from "node:test";
import { History } from "../src/history.js";
import { Session } from "../src/session.js";
import { MemoryStorage } from "../src/storage.js";
import { path } from "../src/tree.js";

/** A server of the model "m" whose answers `answer(response, body)` writes. */
let answer, server, base;
before(async () => {
  server = createServer(async (request, response) => {
    let body = "";
    for await (const piece of request) body += piece;
    if (request.url === "/readyz") response.end('{"status":"ready","models":[]}');
    else if (request.url === "/v1/models") response.end('{"data":[{"id":"m"}]}');
    else answer(response, JSON.parse(body));
  });
  await new Promise((resolve) => server.listen(0, "127.0.0.1", resolve));
  base = `http://127.0.0.1:${server.address().port}/`;
});
after(() => {
  server.closeAllConnections();
  server.close();
});

const write = (response, ...texts) =>
  texts.forEach((content) =>
    response.write(`data: ${JSON.stringify({ choices: [{ delta: { content } }] })}\n\n`),
  );
const end = (response) => response.end("data: [DONE]\n\n");
const shown = ({ state }) =>
  path(state.conversation).map(({ role, content, status }) =>
    [role, content, status].filter((part) => part !== undefined).join(": "),
  );

let session, local;
beforeEach(async () => {
  local = new MemoryStorage();
  session = await open();
  answer = (response, { messages }) => {
    write(response, "to ", messages.at(-1).content);
    end(response);
  };
});

async function open() {
  const opened = new Session(new History(local), local, new MemoryStorage(), base);
  await opened.start();
  return opened;
}

/** Until `holds()`. */
async function until(holds) {
  while (!holds()) await new Promise((resolve) => setTimeout(resolve, 5));
}

test("a conversation, kept", async () => {
  assert.deepEqual(session.state.models, ["m"]);
  assert.equal(session.state.conversation.options.model, "m");
  await session.send("one");
  await session.send("two");
  assert.deepEqual(shown(session), [
    "user: one",
    "assistant: to one: done",
    "user: two",
    "assistant: to two: done",
  ]);
  const [kept] = (await open()).state.conversations;
  assert.equal(kept.title, "one");
  assert.deepEqual(path(kept), path(session.state.conversation));
});

test("each request has what is shown before it, and the options", async () => {
  const bodies = [];
  answer = (response, body) => {
    bodies.push(body);
    write(response, "yes");
    end(response);
  };
  session.setOptions({ system: "Be brief.", temperature: "0.5" });
  await session.send("one");
  await session.send("one, edited", { insteadOf: path(session.state.conversation)[0].id });
  await session.send("two");
  assert.deepEqual(
    bodies.at(-1).messages.map(({ content }) => content),
    ["Be brief.", "one, edited", "yes", "two"],
  );
  assert.deepEqual([bodies[0].temperature, bodies[0].stream], [0.5, true]);
});

test("stopped: what came stays, and the request is closed", async () => {
  let closed = false;
  answer = (response) => {
    response.on("close", () => (closed = true));
    write(response, "so far");
  };
  const sent = session.send("go");
  await until(() => shown(session)[1] === "assistant: so far: running");
  session.stop();
  await sent;
  assert.deepEqual(shown(session), ["user: go", "assistant: so far: stopped"]);
  assert.equal(session.state.running, null);
  await until(() => closed);
});

test("cut: what came stays, with the reason; trying again adds a version", async () => {
  answer = (response) => {
    write(response, "half");
    response.end();
  };
  await session.send("go");
  assert.deepEqual(shown(session)[1], "assistant: half: failed");
  assert.match(path(session.state.conversation)[1].error, /closed before the answer was complete/);
  assert.match(session.state.announcement, /So far: half$/);
  answer = (response) => {
    write(response, "whole");
    end(response);
  };
  await session.regenerate(session.state.conversation.leaf);
  assert.deepEqual(shown(session), ["user: go", "assistant: whole: done"]);
  assert.equal(Object.keys(session.state.conversation.nodes).length, 3);
});

test("refused: the question stays; trying again takes the empty answer's place", async () => {
  answer = (response) => {
    response.statusCode = 429;
    response.end('{"error":{"message":"Too many."}}');
  };
  await session.send("go");
  const [, node] = path(session.state.conversation);
  assert.deepEqual([node.status, node.error], ["failed", "Too many."]);
  answer = (response) => {
    write(response, "yes");
    end(response);
  };
  await session.regenerate(node.id);
  assert.deepEqual(shown(session), ["user: go", "assistant: yes: done"]);
  assert.equal(Object.keys(session.state.conversation.nodes).length, 2);
});

test("an answer goes on in its conversation while another is shown; deleting it stops it", async () => {
  let response;
  answer = (one) => {
    response = one;
    write(one, "first");
  };
  const sent = session.send("go");
  await until(() => shown(session)[1] === "assistant: first: running");
  const { id } = session.state.conversation;
  session.startNew();
  assert.deepEqual(shown(session), []);
  write(response, " second");
  await until(() => path(session.state.conversations[0])[1].content === "first second");
  session.remove(id);
  await sent;
  assert.deepEqual(session.state.conversations, []);
  assert.deepEqual((await open()).state.conversations, []);
});

test("an answer that ran when its page was closed has failed, and keeps what came", async () => {
  answer = (response) => write(response, "so far");
  const sent = session.send("go");
  await until(() => shown(session)[1] === "assistant: so far: running");
  session.flush();
  const later = await open();
  later.open(later.state.conversations[0].id);
  assert.deepEqual(shown(later), ["user: go", "assistant: so far: failed"]);
  session.stop();
  await sent;
});

test("two tabs see each other's conversations", async () => {
  const other = await open();
  await other.send("from the other");
  session.refresh("sluice.chat.x");
  assert.deepEqual(
    session.state.conversations.map(({ title }) => title),
    ["from the other"],
  );
  session.open(session.state.conversations[0].id);
  other.remove(other.state.conversation.id);
  session.refresh("sluice.chat.x");
  assert.deepEqual(session.state.conversations, []);
  assert.equal(shown(session)[0], "user: from the other", "what is shown here stays");
  session.refresh("something.else");
});
