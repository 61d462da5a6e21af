import assert from "node:assert/strict";
import { test } from "node:test";
import { EventParser } from "../src/sse.js";

const STREAM = [
  ": a comment\n\n",
  'data: {"text":"schöne Straße 🦦"}\n\n',
  "data: first\ndata: second\r\n\r\n",
  "event: named\rdata:unspaced\rid: 7\r\r",
  "data:  one space is kept\n\n",
  "data\n\n",
  "retry: 10\n\n",
  "data: [DONE]\n\n",
].join("");
const EVENTS = [
  '{"text":"schöne Straße 🦦"}',
  "first\nsecond",
  "unspaced",
  " one space is kept",
  "",
  "[DONE]",
];

function parsed(pieces) {
  const parser = new EventParser();
  return pieces.flatMap((piece) => parser.push(piece));
}

test("events, whatever ends their lines", () => {
  assert.deepEqual(parsed([new TextEncoder().encode(STREAM)]), EVENTS);
});

test("cut in two at every byte, within characters and line ends too", () => {
  const bytes = new TextEncoder().encode(STREAM);
  for (let at = 0; at <= bytes.length; at++) {
    assert.deepEqual(parsed([bytes.slice(0, at), bytes.slice(at)]), EVENTS, `cut at ${at}`);
  }
});

test("byte by byte", () => {
  const bytes = new TextEncoder().encode(STREAM);
  assert.deepEqual(parsed(Array.from(bytes, (byte) => Uint8Array.of(byte))), EVENTS);
});

test("an event that is not ended is not one", () => {
  assert.deepEqual(parsed([new TextEncoder().encode("data: whole\n\ndata: half\n")]), ["whole"]);
});

test("a byte order mark is not part of the first field", () => {
  assert.deepEqual(parsed([Uint8Array.of(0xef, 0xbb, 0xbf), new TextEncoder().encode("data: x\n\n")]), ["x"]);
});
