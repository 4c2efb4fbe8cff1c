// An OpenID Connect provider that is not ours (oidc-provider), with one client: the dashboard of a mesh. Who signs in is who says so;
// which groups they are in stands in a file, read each time.
//
// node provider.mjs PORT ORIGIN GROUPS.json
import { generateKeyPairSync } from "node:crypto";
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

// Installed below target/, not beside this file.
const installed = createRequire(`${process.env.TEST_NODE}/package.json`).resolve("oidc-provider");
const { default: Provider } = await import(pathToFileURL(installed));

const [port, origin, groups] = process.argv.slice(2);
const groupsOf = (name) => JSON.parse(readFileSync(groups, "utf8"))[name] ?? [];
const key = generateKeyPairSync("ec", { namedCurve: "P-256" }).privateKey.export({ format: "jwk" });

const provider = new Provider(`http://127.0.0.1:${port}`, {
    clients: [{
        client_id: "countersign",
        token_endpoint_auth_method: "none",
        redirect_uris: [`${origin}/sign-in/with/corp/answer`],
        response_types: ["code"],
        grant_types: ["authorization_code"],
        id_token_signed_response_alg: "ES256",
        backchannel_logout_uri: `${origin}/sign-in/with/corp/logout`,
        backchannel_logout_session_required: true,
    }],
    jwks: { keys: [{ ...key, kid: "1", use: "sig", alg: "ES256" }] },
    cookies: { keys: ["only of a test"] },
    claims: { openid: ["sub"], groups: ["groups"] },
    // Groups stand in the ID token itself.
    conformIdTokenClaims: false,
    pkce: { required: () => true },
    features: { devInteractions: { enabled: true }, backchannelLogout: { enabled: true }, rpInitiatedLogout: { enabled: true } },
    findAccount: async (_, name) => ({ accountId: name, claims: async () => ({ sub: name, groups: groupsOf(name) }) }),
    // Nobody is asked for consent: the client is the organisation's own.
    loadExistingGrant: async (ctx) => {
        const grant = new ctx.oidc.provider.Grant({ clientId: ctx.oidc.client.clientId, accountId: ctx.oidc.session.accountId });
        grant.addOIDCScope("openid groups");
        await grant.save();
        return grant;
    },
});
for (const event of ["server_error", "authorization.error", "grant.error", "backchannel.error"]) {
    provider.on(event, (...said) => console.error(event, ...said.filter((one) => one instanceof Error)));
}
provider.on("backchannel.success", () => console.error("backchannel.success"));
provider.listen(Number(port), "127.0.0.1", () => console.log("ready"));
