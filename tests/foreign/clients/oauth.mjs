// Clients of the token service with libraries that know nothing of Countersign: oauth4webapi (one request at a time) and openid-client.
// A workload shows a JWT-SVID; what it is told is written down as JSON.
//
// node oauth.mjs '{"issuer": URL, "caller": {"id", "jwt"}, "callee": {"id", "jwt"}, "next": SPIFFE ID, "outside": {"id", "key": JWK}}'
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

// Installed below target/, not beside this file.
const require = createRequire(`${process.env.TEST_NODE}/package.json`);
const found = async (name) => await import(pathToFileURL(require.resolve(name)));
const oauth = await found("oauth4webapi");
const client = await found("openid-client");

const given = JSON.parse(process.argv[2]);
const issuer = new URL(given.issuer);
const EXCHANGE = "urn:ietf:params:oauth:grant-type:token-exchange";
const ACCESS_TOKEN = "urn:ietf:params:oauth:token-type:access_token";

// What both libraries take as a way to authenticate.
const shows = (svid) => (_as, _client, body) => {
    body.set("client_id", svid.id);
    body.set("client_assertion_type", "urn:ietf:params:oauth:client-assertion-type:jwt-spiffe");
    body.set("client_assertion", svid.jwt);
};

const told = {};
const as = await oauth.processDiscoveryResponse(issuer, await oauth.discoveryRequest(issuer, { algorithm: "oauth2" }));
told.metadata = as;

const caller = { client_id: given.caller.id };
const callee = { client_id: given.callee.id };
const key = await oauth.generateKeyPair("ES256");
const DPoP = oauth.DPoP(caller, key);
told.nonces_asked_for = 0;

async function withNonce(request, process) {
    try {
        return await process(await request());
    } catch (error) {
        if (!oauth.isDPoPNonceError(error)) throw error;
        told.nonces_asked_for += 1;
        return await process(await request());
    }
}

async function refused(action) {
    try {
        await action();
        return null;
    } catch (error) {
        return error.error ?? error.cause?.error ?? error.code ?? String(error);
    }
}

const credentials = (parameters) =>
    withNonce(
        () => oauth.clientCredentialsGrantRequest(as, caller, shows(given.caller), new URLSearchParams(parameters), { DPoP }),
        (response) => oauth.processClientCredentialsResponse(as, caller, response),
    );

const token = await credentials({ resource: given.callee.id });
told.token = { type: token.token_type, scope: token.scope, expires_in: token.expires_in };
told.narrow = (await credentials({ resource: given.callee.id, scope: "http:GET" })).scope;
told.wide = await refused(() => credentials({ resource: given.callee.id, scope: "http:HEAD" }));
told.elsewhere = await refused(() => credentials({ resource: "spiffe://foreign.example/ghost" }));
told.unbound = await refused(async () =>
    oauth.processClientCredentialsResponse(
        as,
        caller,
        await oauth.clientCredentialsGrantRequest(as, caller, shows(given.caller), new URLSearchParams({ audience: given.callee.id })),
    ),
);

// As the service that receives it would: RFC 9068 and RFC 9449, with the keys that the issuer publishes.
let request;
await oauth.protectedResourceRequest(token.access_token, "GET", new URL("https://callee.example/items"), undefined, undefined, {
    DPoP,
    [oauth.customFetch]: async (url, options) => {
        request = new Request(url, options);
        return new Response();
    },
});
told.validated = await oauth.validateJwtAccessToken(as, request, given.callee.id);
told.for_another = await refused(() => oauth.validateJwtAccessToken(as, request, given.caller.id));
const stolen = new Request(request.url, { headers: { authorization: `DPoP ${token.access_token}` } });
told.stolen = await refused(() => oauth.validateJwtAccessToken(as, stolen, given.callee.id));

const look = async (who, svid, token) =>
    oauth.processIntrospectionResponse(as, who, await oauth.introspectionRequest(as, who, shows(svid), token));
told.seen = await look(callee, given.callee, token.access_token);

const calleeKey = await oauth.generateKeyPair("ES256");
const calleeDPoP = oauth.DPoP(callee, calleeKey);
const exchange = (parameters) =>
    withNonce(
        () => oauth.genericTokenEndpointRequest(as, callee, shows(given.callee), EXCHANGE, new URLSearchParams(parameters), { DPoP: calleeDPoP }),
        (response) => oauth.processGenericTokenEndpointResponse(as, callee, response),
    );
const subject = { subject_token: token.access_token, subject_token_type: ACCESS_TOKEN };
const exchanged = await exchange({ ...subject, resource: given.next });
told.exchanged = { type: exchanged.token_type, issued: exchanged.issued_token_type, scope: exchanged.scope };
told.acting = await look(callee, given.callee, exchanged.access_token);

await oauth.processRevocationResponse(await oauth.revocationRequest(as, caller, shows(given.caller), token.access_token));
told.revoked = await look(callee, given.callee, token.access_token);
told.revoked_with_it = await look(callee, given.callee, exchanged.access_token);
told.exchange_of_revoked = await refused(() => exchange({ ...subject, resource: given.next }));

// The same with openid-client, which repeats what asks for a nonce by itself.
const config = await client.discovery(issuer, given.caller.id, undefined, shows(given.caller), { algorithm: "oauth2" });
const handle = client.getDPoPHandle(config, await client.randomDPoPKeyPair("ES256"));
const second = await client.clientCredentialsGrant(config, { audience: given.callee.id }, { DPoP: handle });
told.openid_client = { type: second.token_type, scope: second.scope };
told.openid_client.seen = (await client.tokenIntrospection(config, second.access_token)).active;
await client.tokenRevocation(config, second.access_token);
told.openid_client.revoked = (await client.tokenIntrospection(config, second.access_token)).active;

// A client outside the mesh signs its assertions with a key of its own (private_key_jwt).
const { id, key: jwk } = given.outside;
const signing = await crypto.subtle.importKey("jwk", jwk, { name: "ECDSA", namedCurve: "P-256" }, false, ["sign"]);
const outside = await client.discovery(issuer, id, undefined, client.PrivateKeyJwt({ key: signing, kid: jwk.kid }), { algorithm: "oauth2" });
const outsideHandle = client.getDPoPHandle(outside, await client.randomDPoPKeyPair("ES256"));
const third = await client.clientCredentialsGrant(outside, { resource: given.callee.id }, { DPoP: outsideHandle });
told.outside = { type: third.token_type, scope: third.scope };
told.outside.seen = await client.tokenIntrospection(outside, third.access_token);
told.outside.elsewhere = await refused(() => client.clientCredentialsGrant(outside, { audience: "bank" }, { DPoP: outsideHandle }));

console.log(JSON.stringify(told));
