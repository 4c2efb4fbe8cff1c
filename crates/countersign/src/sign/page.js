// Asks the authenticator for exactly what the command computed, and hands its answer back. Decides nothing.
"use strict";

const bytes = (text) => Uint8Array.from(atob(text.replaceAll("-", "+").replaceAll("_", "/")), (c) => c.charCodeAt(0));
const text = (buffer) =>
  btoa(String.fromCharCode(...new Uint8Array(buffer))).replaceAll("+", "-").replaceAll("/", "_").replaceAll("=", "");

const button = document.getElementById("sign");
const said = document.getElementById("said");

button.addEventListener("click", async () => {
  button.disabled = true;
  said.textContent = "Waiting for the authenticator …";
  try {
    const options = await (await fetch("options.json")).json();
    const publicKey = {
      ...options,
      challenge: bytes(options.challenge),
      allowCredentials: options.allowCredentials.map((one) => ({ ...one, id: bytes(one.id) })),
    };
    const { rawId, response } = await navigator.credentials.get({ publicKey });
    const answer = {
      credential: text(rawId),
      authenticator_data: text(response.authenticatorData),
      client_data_json: text(response.clientDataJSON),
      signature: text(response.signature),
    };
    const taken = await fetch("answer", {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: JSON.stringify(answer),
    });
    said.textContent = await taken.text();
    button.disabled = taken.ok;
  } catch (error) {
    said.textContent = `Nothing was signed: ${error.message}`;
    button.disabled = false;
  }
});
