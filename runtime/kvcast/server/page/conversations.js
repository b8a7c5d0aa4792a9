// Conversations, kept in the browser. A message: {role, content, files: [{name, text}], note}.

const PLACE = "kvcast.conversations";

export function load() {
  try {
    return JSON.parse(localStorage.getItem(PLACE)) ?? [];
  } catch {
    return [];
  }
}

/** False when they do not fit any more. */
export function save(conversations) {
  try {
    localStorage.setItem(PLACE, JSON.stringify(conversations.filter((c) => c.messages.length)));
    return true;
  } catch {
    return false;
  }
}

export const fresh = () => ({ id: crypto.randomUUID?.() ?? String(Date.now() + Math.random()), messages: [] });

export function title(conversation) {
  const first = conversation.messages[0];
  return first ? first.content.split("\n")[0].slice(0, 80) || first.files[0]?.name : "New conversation";
}

/** What is sent. A text that comes with the first question goes before everything else, as in `kvcast chat`: it is read once. */
export function prompt(messages) {
  return messages.flatMap(({ role, content, files = [] }, i) => {
    const texts = files.map((f) => f.text).join("\n\n");
    if (!texts) return [{ role, content }];
    if (i === 0) return [{ role: "system", content: `Answer from this document.\n\n${texts}` }, { role, content }];
    return [{ role, content: `${texts}\n\n${content}` }];
  });
}
