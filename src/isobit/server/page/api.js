// The server's routes, and what goes wrong said in words.

const KEY = "isobit.key";
export const WRONG_KEY = "This is not the server's API key.";

/** Something that a person is told; `again`: it may go better the next time. */
export class Told extends Error {
  constructor(message, { status = 0, again = true } = {}) {
    super(message);
    Object.assign(this, { status, again });
  }
}

export function setKey(key) {
  sessionStorage.setItem(KEY, key);
}

/** What the server says of its model: `id`, `max_model_len`. */
export async function model(signal) {
  return (await (await ask("v1/models", { signal })).json()).data[0];
}

/** The verdict on a receipt, which is the text that came: `identical`, `message`. */
export async function replay(receipt, signal) {
  const answer = await post("replay", `{"isobit_receipt":${receipt}}`, signal);
  try {
    return await answer.json();
  } catch {
    throw lost();
  }
}

/** End an answer that streams: it has its receipt and usage, as at its end. */
export async function stop(id) {
  await post("stop", json({ id }));
}

/** The pieces of an answer as they come: choices' deltas, at the end the receipt and the usage. */
export async function* chat(body, signal) {
  const asked = { ...body, stream: true, stream_options: { include_usage: true }, isobit_receipt: true };
  const answer = await post("v1/chat/completions", json(asked), signal);
  for await (const data of events(answer.body, signal)) {
    if (data === "[DONE]") return;
    const piece = JSON.parse(data);
    if (piece.error) throw new Told(`The answer ended early: ${piece.error.message}`);
    if (piece.choices[0]?.isobit_receipt) piece.receipt = written(data, "isobit_receipt");
    yield piece;
  }
  throw lost();
}

/** JSON in which a BigInt has all of its digits. */
function json(fields) {
  const each = Object.entries(fields).map(([name, value]) =>
    `${JSON.stringify(name)}:${typeof value === "bigint" ? value : JSON.stringify(value)}`);
  return `{${each.join(",")}}`;
}

/** A key's object as it is written: this language's numbers would not keep 64 bits. */
function written(text, key) {
  const name = `"${key}":`; // inside a string the quotes have backslashes
  const rest = text.slice(text.indexOf(name) + name.length);
  let depth = 0;
  for (const found of rest.matchAll(/"(?:[^"\\]|\\.)*"|[{}]/g)) {
    if (found[0] === "{") depth++;
    if (found[0] === "}" && --depth === 0) return rest.slice(0, found.index + 1).trim();
  }
  throw lost();
}

async function* events(stream, signal) {
  let text = "";
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  try {
    while (true) {
      const { done, value } = await reader.read();
      if (done) return;
      const parts = (text + value).split("\n\n");
      text = parts.pop();
      for (const part of parts) if (part.startsWith("data: ")) yield part.slice(6);
    }
  } catch (error) {
    if (signal.aborted || error instanceof Told) throw error;
    throw lost();
  } finally {
    reader.cancel().catch(() => {});
  }
}

function lost() {
  return new Told("The connection was lost before the answer was complete.");
}

async function post(path, body, signal) {
  const headers = { "content-type": "application/json" };
  return ask(path, { method: "POST", headers, body, signal });
}

async function ask(path, options) {
  const key = sessionStorage.getItem(KEY);
  const headers = { ...options.headers, ...(key ? { authorization: `Bearer ${bytes(key)}` } : {}) };
  let answer;
  try {
    answer = await fetch(path, { ...options, headers });
  } catch (error) {
    if (options.signal?.aborted) throw error;
    throw new Told("The server does not answer. Is it still running, and is there a connection to it?");
  }
  if (!answer.ok) throw refused(answer, await answer.json().catch(() => ({})), key);
  return answer;
}

/** A text as a header has it: a character for each byte. */
function bytes(text) {
  return String.fromCharCode(...new TextEncoder().encode(text));
}

function refused(answer, body, key) {
  const status = answer.status;
  const { code, message = `HTTP ${status}` } = body.error ?? {};
  if (status === 401) {
    return new Told(key ? WRONG_KEY : "The server asks for an API key.", { status });
  }
  if (code === "context_length_exceeded") {
    const text = "The conversation is longer than the model's context. Edit an earlier message so "
      + `that what follows it goes, or begin a new chat. (${message})`;
    return new Told(text, { status, again: false });
  }
  const seconds = Number(answer.headers.get("retry-after")) || 1;
  const later = `Try again in ${seconds} ${seconds === 1 ? "second" : "seconds"}.`;
  if (status === 429) return new Told(`The server is busy with other requests. ${later}`, { status });
  if (status === 503) return new Told("The server is shutting down.", { status });
  if (status >= 500) return new Told(`The server has a fault: ${message}`, { status });
  return new Told(`The server refused this: ${message}`, { status });
}
