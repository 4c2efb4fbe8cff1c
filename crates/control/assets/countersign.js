// What the pages do besides showing: ceremonies with authenticators, and forms that are answered in JSON. No rule is enforced
// here; whatever is sent is judged by the control plane.
"use strict";

const meta = (name) => document.querySelector(`meta[name="${name}"]`)?.content ?? "";

const bytes = (text) => Uint8Array.from(atob(text.replace(/-/g, "+").replace(/_/g, "/")), (c) => c.charCodeAt(0));

const base64url = (buffer) =>
  btoa(String.fromCharCode(...new Uint8Array(buffer))).replace(/\+/g, "-").replace(/\//g, "_").replace(/=+$/, "");

// Sends JSON and returns the answer, or throws what the control plane says is wrong.
async function send(path, body) {
  const headers = { "content-type": "application/json" };
  const csrf = meta("countersign-csrf");
  if (csrf) headers["x-countersign-csrf"] = csrf;
  const response = await fetch(path, { method: "POST", headers, body: JSON.stringify(body ?? {}), credentials: "same-origin" });
  const text = await response.text();
  const answer = text ? JSON.parse(text) : {};
  if (!response.ok) throw Object.assign(new Error(answer.title ?? `the answer was ${response.status}`), answer);
  return answer;
}

const descriptors = (list) => (list ?? []).map((key) => ({ ...key, id: bytes(key.id) }));

// Asks the authenticator for a new key and returns it in WebAuthn's JSON.
async function create(options) {
  const publicKey = {
    ...options,
    challenge: bytes(options.challenge),
    user: { ...options.user, id: bytes(options.user.id) },
    excludeCredentials: descriptors(options.excludeCredentials),
  };
  const made = await navigator.credentials.create({ publicKey });
  return {
    id: made.id,
    rawId: base64url(made.rawId),
    type: made.type,
    authenticatorAttachment: made.authenticatorAttachment,
    response: {
      attestationObject: base64url(made.response.attestationObject),
      clientDataJSON: base64url(made.response.clientDataJSON),
      transports: made.response.getTransports?.() ?? [],
    },
    clientExtensionResults: made.getClientExtensionResults(),
  };
}

// Asks a key to sign, and returns what the control plane takes.
async function sign({ nonce, options }) {
  const publicKey = {
    ...options,
    challenge: bytes(options.challenge),
    allowCredentials: descriptors(options.allowCredentials),
  };
  const made = await navigator.credentials.get({ publicKey });
  const handle = made.response.userHandle;
  return {
    nonce,
    credential: base64url(made.rawId),
    authenticator_data: base64url(made.response.authenticatorData),
    client_data_json: base64url(made.response.clientDataJSON),
    signature: base64url(made.response.signature),
    ...(handle && handle.byteLength ? { user_handle: base64url(handle) } : {}),
  };
}

// Says what went wrong, and what to do, where the form is.
function complain(form, error) {
  const place = form.querySelector("[data-error]");
  if (!place) return;
  const said = error.name === "NotAllowedError" ? "The authenticator was not used, or refused." : error.message;
  place.replaceChildren(...[said, error.detail, error.help].filter(Boolean).map((text) => {
    const line = document.createElement("p");
    line.textContent = text;
    return line;
  }));
  place.hidden = false;
}

const field = (form, name) => form.elements[name]?.value?.trim() ?? "";

// The right to enrol comes in the fragment of the link, which no server sees. It leaves the address bar at once.
let link = "";
function takeLink() {
  if (location.pathname !== "/enroll" || !location.hash) return;
  link = decodeURIComponent(location.hash.slice(1));
  history.replaceState(null, "", location.pathname);
}
takeLink();
addEventListener("hashchange", takeLink);

function enrol(form) {
  const invitation = field(form, "invitation") || link;
  const recovery = field(form, "recovery_code");
  return {
    operator: field(form, "operator"),
    ...(invitation ? { invitation } : {}),
    shown: recovery ? { recovery_code: recovery } : {},
  };
}

function enrolled(form, answer) {
  if (answer.change) return location.assign(`/changes/${answer.change}`);
  const done = document.getElementById("enrolled");
  document.getElementById("enroll-forms").hidden = true;
  done.hidden = false;
  const codes = done.querySelector("[data-codes]");
  codes.textContent = answer.recovery_codes.join("\n");
  done.querySelector("[data-with-codes]").hidden = answer.recovery_codes.length === 0;
  done.querySelector("a, button").focus();
}

// After an answer to a change: the page as it is now, unless there is something to hand to those whom it invites.
function answered(form, { invitations }) {
  if (!invitations?.length) return location.reload();
  const handed = document.getElementById("handed");
  handed.querySelector("[data-invitations]").replaceChildren(...invitations.map(({ operator, url, token }) => {
    const line = document.createElement("li");
    const link = document.createElement("code");
    link.textContent = url ?? token;
    line.append(`${operator}: `, link);
    return line;
  }));
  document.getElementById("answers").hidden = true;
  handed.hidden = false;
  handed.focus();
}

// What a form does when it is sent, by its data-do.
const deeds = {
  async "sign-in-key"(form) {
    const operator = field(form, "operator");
    const challenge = await send("/sign-in/key/begin", operator ? { operator } : {});
    await send("/sign-in/key/finish", await sign(challenge));
    location.assign(form.dataset.next || "/");
  },
  async "sign-in-code"(form) {
    await send("/sign-in/code", { operator: field(form, "operator"), code: field(form, "code") });
    location.assign(form.dataset.next || "/");
  },
  async "sign-out"() {
    await send("/sign-out");
    location.assign("/sign-in");
  },
  async "enroll-key"(form, submitter) {
    const attachment = submitter?.value;
    const begun = await send("/enroll/key/begin", { enrol: enrol(form), ...(attachment ? { attachment } : {}) });
    enrolled(form, await send("/enroll/key/finish", { id: begun.id, credential: await create(begun.options) }));
  },
  async "enroll-code"(form) {
    if (!form.dataset.id) {
      const begun = await send("/enroll/code/begin", enrol(form));
      form.dataset.id = begun.id;
      form.querySelector("[data-otpauth]").textContent = begun.otpauth;
      const image = form.querySelector("[data-qr]");
      if (begun.qr) image.src = `data:image/svg+xml,${encodeURIComponent(begun.qr)}`;
      image.hidden = !begun.qr;
      form.querySelector("[data-confirm]").hidden = false;
      form.elements.code.required = true;
      form.elements.code.focus();
      return;
    }
    enrolled(form, await send("/enroll/code/finish", { id: form.dataset.id, confirm: { code: field(form, "code") } }));
  },
  async "change-key"(form) {
    const path = `/changes/${form.dataset.change}`;
    const challenge = await send(`${path}/challenge`);
    answered(form, await send(`${path}/sign`, await sign(challenge)));
  },
  async "change-code"(form, submitter) {
    answered(form, await send(`/changes/${form.dataset.change}/${submitter?.value || "code"}`, { code: field(form, "code") }));
  },
  async "act-key"(form) {
    const path = `/acts/${form.dataset.act}`;
    await send(`${path}/sign`, await sign(await send(`${path}/challenge`)));
    location.reload();
  },
  async "act-code"(form) {
    await send(`/acts/${form.dataset.act}/code`, { code: field(form, "code") });
    location.reload();
  },
  async ask(form) {
    const { change } = await send("/operators/ask", Object.fromEntries(new FormData(form)));
    location.assign(change ? `/changes/${change}` : "/operators");
  },
  async device(form, submitter) {
    const { allowed } = await send("/device/answer", { code: form.dataset.code, allow: submitter?.value === "allow" });
    const done = document.getElementById("answered");
    done.querySelector("[data-answer]").textContent = allowed ? "The command is signed in" : "The command was denied";
    form.closest("section").hidden = true;
    done.hidden = false;
    done.focus();
  },
  async "end-session"(form) {
    await send(`/sessions/${form.dataset.session}/end`);
    location.reload();
  },
};

document.addEventListener("submit", async (event) => {
  const form = event.target;
  const deed = deeds[form.dataset.do];
  if (!deed) return;
  event.preventDefault();
  const place = form.querySelector("[data-error]");
  if (place) place.hidden = true;
  form.setAttribute("aria-busy", "true");
  try {
    await deed(form, event.submitter);
  } catch (error) {
    complain(form, error);
  } finally {
    form.removeAttribute("aria-busy");
  }
});
