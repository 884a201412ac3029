// The server's routes, and what goes wrong said in words.

const KEY = "isobit.key";

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

/** The verdict on a receipt: `identical`, `message`. */
export async function replay(receipt, signal) {
  const answer = await post("replay", { isobit_receipt: receipt }, signal);
  try {
    return await answer.json();
  } catch {
    throw lost();
  }
}

/** The pieces of an answer as they come: choices' deltas, at the end the receipt and the usage. */
export async function* chat(body, signal) {
  const asked = { ...body, stream: true, stream_options: { include_usage: true }, isobit_receipt: true };
  const answer = await post("v1/chat/completions", asked, signal);
  for await (const data of events(answer.body, signal)) {
    if (data === "[DONE]") return;
    const piece = JSON.parse(data);
    if (piece.error) throw new Told(`The answer ended early: ${piece.error.message}`);
    yield piece;
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
  return ask(path, { method: "POST", headers, body: JSON.stringify(body), signal });
}

async function ask(path, options) {
  const key = sessionStorage.getItem(KEY);
  const headers = { ...options.headers, ...(key ? { authorization: `Bearer ${key}` } : {}) };
  let answer;
  try {
    answer = await fetch(path, { ...options, headers });
  } catch (error) {
    if (options.signal?.aborted) throw error;
    throw new Told("The server does not answer. Is it still running, and is there a connection to it?");
  }
  if (!answer.ok) throw refused(answer, await answer.json().catch(() => ({})));
  return answer;
}

function refused(answer, body) {
  const status = answer.status;
  const { code, message = `HTTP ${status}` } = body.error ?? {};
  if (status === 401) return new Told("The server asks for an API key.", { status });
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
