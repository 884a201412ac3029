// The page: a conversation, the answer that is coming, and what may be done with both.

import * as api from "./api.js";
import * as conversation from "./conversation.js";
import { announce, button, element, fit, isSend } from "./dom.js";
import { Answer, failure, question } from "./message.js";
import * as settings from "./settings.js";

const at = (id) => document.getElementById(id);
const [list, area, root] = [at("messages"), at("question"), document.documentElement];

let messages = conversation.load();
let coming = null; // the AbortController of the answer that is coming
let name = ""; // the model's

const RATE = new Intl.NumberFormat("en", { maximumSignificantDigits: 3 });

/** Show all of the conversation. */
function show() {
  list.replaceChildren(...messages.map((message, i) => {
    if (message.role === "user") return question(message, (text) => resend(i, text));
    const answer = new Answer(message);
    finish(answer, i);
    return answer.article;
  }));
  at("empty").hidden = messages.length > 0;
}

/** What is offered beneath an answer that is complete, the conversation's i-th message. */
function finish(answer, i) {
  answer.end();
  const { receipt } = answer.message;
  answer.offer(button("Regenerate", () => regenerate(i), "Regenerate; what follows is dropped"));
  if (!receipt) return;
  const verify = button("Replay on the CPU", async () => {
    verify.disabled = true;
    answer.judge("none", "Computing it again…");
    try {
      const verdict = await api.replay(receipt);
      const kind = verdict.identical ? "identical" : "different";
      answer.message.verdict = { kind, words: verdict.message };
      answer.judge(kind, verdict.message);
      keep();
    } catch (error) {
      answer.judge("none", error.message);
    }
    verify.disabled = false;
  });
  answer.offer(verify, button("Receipt", () => download(receipt), "Save the receipt as a file"));
}

function download(receipt) {
  const href = URL.createObjectURL(new Blob([JSON.stringify(receipt, null, 1)]));
  element("a", { href, download: "receipt.json" }).click();
  setTimeout(() => URL.revokeObjectURL(href), 60_000);
}

function keep() {
  if (!conversation.save(messages)) {
    announce("This conversation is not kept: the browser has no room for it.");
  }
}

function regenerate(i) {
  messages = messages.slice(0, i);
  respond();
}

function resend(i, text) {
  messages = [...messages.slice(0, i), { role: "user", text }];
  respond();
}

/** Ask for the answer to the conversation as it stands; an answer that is coming ends. */
async function respond() {
  coming?.abort();
  const own = (coming = new AbortController());
  const message = { role: "assistant", text: "" };
  const answer = new Answer(message);
  keep();
  show();
  list.append(answer.article);
  answer.begin();
  area.focus();
  busy(true);
  scrollTo({ top: root.scrollHeight });
  let failed = null;
  try {
    await receive(message, own.signal, () => answer.grown(follow));
  } catch (error) {
    if (own.signal.aborted) message.note = "Stopped.";
    else failed = error;
  }
  if (coming !== own) return; // another was asked for
  coming = null;
  if (message.text || message.thinking || !failed) {
    if (failed) message.note = "Incomplete.";
    messages.push(message);
    finish(answer, messages.length - 1);
    keep();
  } else {
    answer.article.remove();
  }
  busy(false);
  if (failed) tell(failed);
  scrollTo({ top: root.scrollHeight });
}

/** Fill a message with what comes. */
async function receive(message, signal, grown) {
  const body = { model: name, messages: conversation.asked(messages, settings.system()) };
  const asked = performance.now();
  let first = 0;
  for await (const piece of api.chat({ ...body, ...settings.fields() }, signal)) {
    const choice = piece.choices[0];
    if (choice) {
      first ||= performance.now();
      message.text += choice.delta.content ?? "";
      if (choice.delta.reasoning_content) {
        message.thinking = (message.thinking ?? "") + choice.delta.reasoning_content;
      }
      if (choice.isobit_receipt) message.receipt = choice.isobit_receipt;
      if (choice.finish_reason === "length") message.note = "Cut: the most tokens were reached.";
      grown();
    } else if (piece.usage) {
      message.stats = measured(piece.usage, asked, first);
    }
  }
}

/** "38 tokens · 410 tokens/s"; the first token's time is the prompt's, and not in the rate. */
function measured(usage, asked, first) {
  const n = usage.completion_tokens;
  const seconds = (performance.now() - first) / 1000;
  const said = [`${n} ${n === 1 ? "token" : "tokens"}`];
  if (n > 1 && seconds > 0) said.push(`${RATE.format((n - 1) / seconds)} tokens/s`);
  if (first) said.push(`first after ${((first - asked) / 1000).toFixed(2)} s`);
  return said.join(" · ");
}

/** Whether the end was in view, and so should stay there, is known before the text grows. */
function follow() {
  const near = root.scrollHeight - root.scrollTop - root.clientHeight < 80;
  return () => near && scrollTo({ top: root.scrollHeight });
}

function tell(error) {
  if (error.status === 401) askKey(respond);
  const words = error instanceof api.Told ? error.message : `This page has a fault: ${error.message}`;
  const again = () => regenerate(messages.findLastIndex(({ role }) => role === "user") + 1);
  list.append(failure(words, error.again === false ? null : again));
}

function busy(yes) {
  at("send").hidden = yes;
  at("stop").hidden = !yes;
  if (yes) at("announcer").replaceChildren();
  announce(yes ? "The model answers." : "The answer is complete.");
}

// The server and its key

async function connect() {
  try {
    name = (await api.model()).id;
    at("model").textContent = name;
    document.title = `${name} · isobit`;
  } catch (error) {
    if (error.status === 401) askKey(connect);
    else list.append(failure(error.message, connectAgain));
  }
}

function connectAgain() {
  list.querySelector(".failure")?.remove();
  connect();
}

function askKey(then) {
  const dialog = at("key");
  dialog.querySelector("form").onsubmit = (event) => {
    api.setKey(event.target.elements.key.value);
    event.target.reset();
    setTimeout(then);
  };
  if (!dialog.open) dialog.showModal();
}

// What people do

at("ask").onsubmit = (event) => {
  event.preventDefault();
  const text = area.value;
  if (!text.trim() || coming) return;
  area.value = "";
  fit(area);
  messages.push({ role: "user", text });
  respond();
};
at("stop").onclick = () => {
  coming?.abort();
  area.focus();
};
at("new").onclick = () => {
  coming?.abort();
  coming = null;
  busy(false);
  messages = [];
  keep();
  show();
  area.focus();
};
at("change-key").onclick = () => {
  settings.close();
  askKey(connect);
};
area.oninput = () => fit(area);
area.onkeydown = (event) => {
  if (isSend(event)) {
    event.preventDefault();
    at("ask").requestSubmit();
  }
};
addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !document.querySelector("dialog[open]")) coming?.abort();
});
conversation.watch(() => {
  if (coming) return;
  messages = conversation.load();
  show();
});

settings.begin();
show();
scrollTo({ top: root.scrollHeight });
connect();
