// The chat: conversations, questions, streamed answers.

import { ApiError, chat, getJson, setKey, watch } from "./api.js";
import { fresh, load, prompt, save, title } from "./conversations.js";
import * as map from "./map.js";
import { bytes, copyButton, element, number, render } from "./text.js";

const $ = (id) => document.getElementById(id);
const CHARACTERS_PER_TOKEN = 4; // about, in English
const DRAW_MS = 100; // between two drawings of an answer: the model needs the processor
let conversations = load();
let current = conversations[0] ?? fresh();
let files = []; // attached to the question that is being written
let running = null; // the AbortController of the running answer
let nCtx = Infinity;

// ---- conversations

function keep() {
  if (!conversations.includes(current)) conversations.unshift(current);
  if (!save(conversations)) fail("This browser has no room left for the conversation. It goes on, but is lost with the page; delete older ones.");
  list();
}

function list() {
  $("list").replaceChildren(...conversations.map((c) => {
    const open = element("button", { type: "button", textContent: title(c), className: "open" });
    if (c === current) open.setAttribute("aria-current", "true");
    open.addEventListener("click", () => choose(c));
    const remove = element("button", { type: "button", textContent: "×", className: "remove", ariaLabel: `Delete ${title(c)}`, title: "Delete" });
    remove.addEventListener("click", () => {
      if (!confirm(`Delete “${title(c)}”?`)) return;
      conversations = conversations.filter((other) => other !== c);
      save(conversations);
      if (c === current) choose(conversations[0] ?? fresh());
      else list();
    });
    return element("li", {}, open, remove);
  }));
}

function choose(conversation) {
  running?.abort();
  current = conversation;
  showSide(false);
  fail("");
  list();
  showLog();
  $("question").focus();
}

function showSide(open) {
  document.body.classList.toggle("side", open);
  $("show-list").setAttribute("aria-expanded", open);
}

// ---- the log

function messageNode(message) {
  const who = message.role === "user" ? "You" : "Answer";
  const node = element("article", { className: message.role }, element("h2", { textContent: who }));
  node.append(...(message.files ?? []).map((f) => element("p", { className: "chip", textContent: `${f.name} · ${bytes(f.text.length)}` })));
  node.append(element("div", { className: "body" }, ...render(message.content)));
  if (message.role === "assistant") node.append(element("div", { className: "tools" }));
  return node;
}

function tools(node, message, last) {
  const line = node.querySelector(".tools");
  line.replaceChildren(copyButton(() => message.content));
  if (last) {
    const again = element("button", { type: "button", textContent: "Regenerate" });
    again.addEventListener("click", () => {
      current.messages.pop();
      answer();
    });
    line.append(again);
  }
  line.append(element("span", { className: "hint", textContent: message.note ?? "" }));
}

function showLog() {
  const { messages } = current;
  $("log").replaceChildren(...messages.map((message, i) => {
    const node = messageNode(message);
    const last = i === messages.length - 1;
    if (message.role === "assistant" && !(running && last)) tools(node, message, last);
    return node;
  }));
  if (!messages.length) {
    $("log").append(element("p", { className: "empty", textContent: "Attach a long text and ask about it. The map shows which parts of it the model looks at." }));
  } else if (messages.at(-1).role === "user") { // its answer failed, or the page was closed
    const again = element("button", { type: "button", textContent: "Ask again" });
    again.addEventListener("click", answer);
    $("log").append(again);
  }
  $("log").scrollTop = $("log").scrollHeight;
}

function fail(message) {
  $("error").hidden = !message;
  $("error").firstElementChild.textContent = message;
}

// ---- asking

async function answer() {
  const conversation = current;
  const message = { role: "assistant", content: "" };
  const sent = prompt(conversation.messages);
  conversation.messages.push(message);
  running = new AbortController();
  fail("");
  showLog();
  const node = $("log").lastElementChild;
  const body = node.querySelector(".body");
  body.textContent = "…";
  $("log").setAttribute("aria-busy", "true"); // read aloud when it is complete
  busy(true);
  const begin = performance.now();
  let first = 0, n = 0, drawing = 0, end = "";
  const update = () => {
    drawing = 0;
    const following = $("log").scrollHeight - $("log").scrollTop - $("log").clientHeight < 80;
    body.replaceChildren(...render(message.content));
    if (following) $("log").scrollTop = $("log").scrollHeight;
  };
  try {
    for await (const choice of chat($("model").value || undefined, sent, running.signal)) {
      if (choice.delta.content) {
        first ||= performance.now();
        n++;
        message.content += choice.delta.content;
        drawing ||= setTimeout(update, DRAW_MS);
      }
      if (choice.finish_reason === "length") end = " · cut off; ask it to go on";
    }
  } catch (error) {
    if (error.name === "AbortError") end = " · stopped";
    else problem(error);
  }
  clearTimeout(drawing);
  running = null;
  busy(false);
  $("log").setAttribute("aria-busy", "false");
  if (n) {
    const seconds = (performance.now() - first) / 1000;
    const speed = n > 1 ? `${((n - 1) / seconds).toFixed(1)} tok/s · ` : "";
    message.note = `${speed}${number(n)} tokens · first after ${((first - begin) / 1000).toFixed(1)} s${end}`;
  } else {
    conversation.messages.pop();
  }
  if (!save(conversations)) keep();
  if (conversation !== current) return;
  if (n) {
    update();
    tools(node, message, true);
  } else {
    showLog();
  }
}

function problem(error) {
  if (error instanceof ApiError && error.status === 401) $("key").showModal();
  fail(error instanceof ApiError ? error.message : `The page failed (${error.message}); reload it.`);
}

function busy(on) {
  $("send").hidden = on;
  $("stop").hidden = !on;
}

function send() {
  const content = $("question").value.trim();
  if (running || (!content && !files.length)) return;
  current.messages.push({ role: "user", content: content || "What is this text about?", files });
  $("question").value = "";
  files = [];
  showFiles();
  size();
  keep();
  answer();
}

// ---- files

async function attach(chosen) {
  fail("");
  for (const file of chosen) {
    try {
      const text = new TextDecoder("utf-8", { fatal: true }).decode(await file.arrayBuffer());
      files.push({ name: file.name, text });
    } catch {
      fail(`“${file.name}” is not UTF-8 text. Convert it to plain text first.`);
    }
  }
  showFiles();
  $("question").focus();
}

function showFiles() {
  $("files").replaceChildren(...files.map((file) => {
    const tokens = file.text.length / CHARACTERS_PER_TOKEN;
    const room = tokens > nCtx ? ` (the context holds ${number(nCtx)})` : "";
    const remove = element("button", { type: "button", textContent: "×", ariaLabel: `Remove ${file.name}` });
    remove.addEventListener("click", () => {
      files = files.filter((other) => other !== file);
      showFiles();
      $("question").focus();
    });
    const text = `${file.name} · ${bytes(file.text.length)} · about ${number(Math.ceil(tokens / 100) * 100)} tokens${room}`;
    return element("li", { className: room ? "chip warn" : "chip" }, text, remove);
  }));
}

function size() {
  const box = $("question");
  box.style.height = "auto";
  box.style.height = `${box.scrollHeight}px`;
}

// ---- the server

async function models() {
  const { data } = await getJson("v1/models");
  const chosen = $("model").value;
  $("model").replaceChildren(...data.map(({ id }) => element("option", { value: id, textContent: id.split("/").at(-1) })));
  if (data.some(({ id }) => id === chosen)) $("model").value = chosen;
  $("model").disabled = data.length < 2;
}

const pause = (ms) => new Promise((resolve) => { setTimeout(resolve, ms); });
const visible = () => new Promise((resolve) => {
  if (!document.hidden) resolve();
  else document.addEventListener("visibilitychange", resolve, { once: true });
});

async function follow() {
  for (;;) {
    await visible();
    const looking = new AbortController();
    const hide = () => { if (document.hidden) looking.abort(); };
    document.addEventListener("visibilitychange", hide);
    try {
      await models();
      for await (const snapshot of watch(looking.signal)) {
        if (snapshot.n_ctx && snapshot.n_ctx !== nCtx) {
          nCtx = snapshot.n_ctx;
          showFiles();
        }
        $("status").textContent = { idle: "", reading: "reading", answering: "answering", loading: "loading the model", failed: "the model cannot be loaded" }[snapshot.state];
        map.show(snapshot);
      }
      $("status").textContent = "the server has ended";
    } catch (error) {
      document.removeEventListener("visibilitychange", hide);
      if (error.status === 401) {
        if (!$("key").open) $("key").showModal();
        await new Promise((resolve) => { $("key").addEventListener("close", resolve, { once: true }); });
        continue;
      }
      if (error.name !== "AbortError") $("status").textContent = "the server does not answer";
    }
    document.removeEventListener("visibilitychange", hide);
    await pause(1500);
  }
}

// ---- events

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
$("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    send();
  }
});
$("question").addEventListener("input", size);
$("stop").addEventListener("click", () => {
  running?.abort();
  $("question").focus();
});
$("new").addEventListener("click", () => choose(fresh()));
$("attach").addEventListener("click", () => $("file").click());
$("file").addEventListener("change", async (event) => {
  await attach(event.target.files);
  event.target.value = "";
});
document.addEventListener("dragover", (event) => event.preventDefault());
document.addEventListener("drop", (event) => {
  event.preventDefault();
  attach(event.dataTransfer.files);
});
$("error").querySelector("button").addEventListener("click", () => fail(""));
$("show-list").addEventListener("click", () => showSide(!document.body.classList.contains("side")));
document.addEventListener("keydown", (event) => { if (event.key === "Escape") showSide(false); });
$("key").addEventListener("close", () => {
  setKey($("key-value").value.trim());
  $("key-value").value = "";
  fail("");
});

map.start();
list();
showLog();
$("question").focus();
follow();
