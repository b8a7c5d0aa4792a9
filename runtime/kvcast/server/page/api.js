// Talking to the server: requests with the key, streams of events, and errors as sentences.

const KEY = "kvcast.key";

export class ApiError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

export const setKey = (key) => localStorage.setItem(KEY, key);

async function request(path, options = {}) {
  const headers = { ...options.headers };
  const key = localStorage.getItem(KEY);
  if (key) headers.Authorization = `Bearer ${key}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server does not answer. Start it with “kvcast serve” and ask again.", 0);
  }
  if (response.ok) return response;
  let message = `The server answered with status ${response.status}.`;
  try {
    message = sentence((await response.json()).error.message);
  } catch { /* not ours: the status says it */ }
  throw new ApiError(message, response.status);
}

export const getJson = async (path) => (await request(path)).json();

/** The JSON values of a stream of server-sent events, until it ends. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    let part;
    try {
      part = await reader.read();
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ApiError("The server went away in the middle. Start it with “kvcast serve” and ask again.", 0);
    }
    if (part.done) return;
    const lines = (rest + part.value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data: ") || line === "data: [DONE]") continue;
      const value = JSON.parse(line.slice(6));
      if (value.error) throw new ApiError(sentence(value.error.message), 500);
      yield value;
    }
  }
}

export async function* watch(signal) {
  yield* events(await request("v1/kv/stream", { signal }));
}

/** The choices of a streamed answer. */
export async function* chat(model, messages, signal) {
  const body = JSON.stringify({ model, messages, stream: true, temperature: 0.2, max_tokens: 1024 });
  const response = await request("v1/chat/completions", { method: "POST", headers: { "Content-Type": "application/json" }, body, signal });
  for await (const chunk of events(response)) yield chunk.choices[0];
}

function sentence(text) {
  return text.charAt(0).toUpperCase() + text.slice(1) + (/[.!?]$/.test(text) ? "" : ".");
}
