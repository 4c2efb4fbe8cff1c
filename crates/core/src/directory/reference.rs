//! Every key of a mesh directory, said once: the reader refuses what is not in these tables, and the reference page
//! `docs/mesh-directory.md` is written from them.

/// A key of a table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Key {
    /// As it is written.
    pub name: &'static str,
    /// What its value looks like.
    pub shape: &'static str,
    /// What holds when it is absent.
    pub default: &'static str,
    /// What it does.
    pub says: &'static str,
}

/// A table of a file.
#[derive(Debug, Clone, Copy)]
pub struct Section {
    /// The file.
    pub file: &'static str,
    /// Its heading: `[services.NAME]`.
    pub table: &'static str,
    /// What it is for.
    pub says: &'static str,
    /// Its keys.
    pub keys: &'static [Key],
}

/// Every table of every file, in the order in which one reads about them.
pub fn reference() -> [Section; 15] {
    let (mesh, roles, routes) = (super::MESH_FILE, super::ROLES_FILE, super::ROUTES_FILE);
    [
        Section { file: mesh, table: "", says: "At the top of the file.", keys: MESH },
        Section {
            file: mesh,
            table: "[defaults]",
            says: "What holds for services that say nothing else.",
            keys: DEFAULTS,
        },
        Section {
            file: mesh,
            table: "[seal]",
            says: "A sealed mesh: agents refuse every change that fewer operators signed, with a passkey or a security key, than `quorum`.\nIt is sealed by the first `apply` at which so many operators have a key, and stays sealed: leaving the table out changes nothing.",
            keys: SEAL,
        },
        Section {
            file: mesh,
            table: "[factors]",
            says: "Which passkeys and security keys may be enrolled. Without it any may be. With it an authenticator has to prove its model,\nby an attestation: [dashboard.md](dashboard.md#which-authenticators). Factors that are enrolled stay.",
            keys: FACTORS,
        },
        Section {
            file: mesh,
            table: "[authority]",
            says: "How long what the authority signs from now on is good ([authority.md](authority.md#lifetimes)). What is signed already keeps\nwhat it has.",
            keys: AUTHORITY,
        },
        Section {
            file: mesh,
            table: "[services.NAME]",
            says: "A service. NAME is one DNS label: `a`-`z`, `0`-`9` and `-`. Its workloads are `spiffe://TRUST_DOMAIN/NAME`.",
            keys: SERVICE,
        },
        Section {
            file: mesh,
            table: "[[services.NAME.attest]]",
            says: "Processes that are this service although no agent started them: those with all of the selectors. At most 16 for a service; of several\nservices that a process could be, it is the one that says most of it. [workload-api.md](workload-api.md#processes-that-the-agent-did-not-start)",
            keys: ATTEST,
        },
        Section {
            file: mesh,
            table: "[issuers.NAME]",
            says: "An OpenID Connect provider whose tokens are believed. NAME has 1 to 64 letters, digits, `-`, `_` and `.`.",
            keys: ISSUER,
        },
        Section {
            file: mesh,
            table: "[pipelines.NAME]",
            says: "An automation that may propose changes, which an operator countersigns: [pipelines.md](pipelines.md). It is matched by\nclaims that its issuer gives to nobody else. A `*`, the `sub` of GitHub or GitLab, and names without their ids are refused: a\nname that is given up can be registered by a stranger. A workload of the mesh proposes with its JWT-SVID: `issuer = \"mesh\"`, and its\nSPIFFE ID as `sub`.",
            keys: PIPELINE,
        },
        Section {
            file: mesh,
            table: "[sign_in.NAME]",
            says: "An OpenID Connect provider for people, and which of its groups mean which roles ([`login.md`](login.md#with-a-provider)). The\ndashboard offers to sign in by it, and who does is named `NAME:SUBJECT`. NAME has 1 to 64 letters, digits, `-`, `_` and `.`,\nand is none of `pipeline`, `operator`, `local` and `mesh`. A client secret never stands here: `--sign-in-secrets`.",
            keys: SIGN_IN,
        },
        Section {
            file: mesh,
            table: "[clients.NAME]",
            says: "A client of the token service that is no workload: [tokens.md](tokens.md#clients-outside). NAME is one DNS label; policies and roles\nknow it as `spiffe://TRUST_DOMAIN/countersign/client/NAME`.",
            keys: CLIENT,
        },
        Section {
            file: roles,
            table: "[roles.NAME]",
            says: "A role, for policies: `principal in Role::\"NAME\"`. NAME has 1 to 64 letters, digits, `-`, `_` and `.`.",
            keys: ROLE,
        },
        Section {
            file: routes,
            table: "[routes.NAME]",
            says: "A traffic rule. The rules of a service are tried in the order of the file; the first that matches holds. \
                   NAME has 1 to 64 letters, digits, `-`, `_` and `.`.",
            keys: ROUTE,
        },
        Section { file: routes, table: "retry = { … }", says: "", keys: RETRY },
        Section {
            file: routes,
            table: "limit = { … }",
            says: "At least one of rate and concurrency. A caller is a SPIFFE ID. Its own sidecar holds each of its instances to the limit\nbefore anything is sent; the sidecar of each instance of `service` holds all instances of a caller, together, to it. So one\ncaller takes at most the limit times the instances of the caller, or of the service, whichever are fewer. What a `split`\nsends to another service is limited by the caller's sidecar alone.",
            keys: LIMIT,
        },
    ]
}

const fn key(name: &'static str, shape: &'static str, default: &'static str, says: &'static str) -> Key {
    Key { name, shape, default, says }
}

pub(super) const MESH: &[Key] = &[
    key("trust_domain", "string", "required", "The namespace of the mesh, like `shop.example`. It can never change."),
    key("defaults", "table", "", "See below."),
    key("seal", "table", "", "See below."),
    key("factors", "table", "", "See below."),
    key("authority", "table", "", "See below."),
    key("services", "table", "", "See below."),
    key("issuers", "table", "", "See below."),
    key("pipelines", "table", "", "See below."),
    key("sign_in", "table", "", "See below."),
    key("clients", "table", "", "See below."),
];

pub(super) const CLIENT: &[Key] = &[
    key(
        "services",
        "array of services",
        "required",
        "The services that it may ask tokens for. What it may do there policies say.",
    ),
    key(
        "keys",
        "array of strings",
        "required",
        "The public keys that it signs its assertions with, each a JWK: at most 8.",
    ),
];

pub(super) const ISSUER: &[Key] = &[
    key(
        "url",
        "URL",
        "required",
        "The issuer, exactly as its tokens and its discovery document say it. `https`; `http` only for this machine itself.",
    ),
    key("audience", "string", "required", "Whom its tokens must be meant for: a name that is this mesh's own."),
];

pub(super) const PIPELINE: &[Key] = &[
    key("issuer", "issuer", "required", "Who vouches for it: one of `[issuers.*]`."),
    key(
        "claims",
        "table of strings",
        "required",
        "What its token must say, each exactly. At least one is an id: `repository_id` or `repository_owner_id` at GitHub, `project_id` or `namespace_id` at GitLab.",
    ),
    key("roles", "array of strings", "none", "What the change gate knows it as: `principal in Role::\"…\"`."),
];

pub(super) const SIGN_IN: &[Key] = &[
    key("issuer", "issuer", "required", "The provider: one of `[issuers.*]`."),
    key(
        "client_id",
        "string",
        "required",
        "What the provider calls this mesh: whom its tokens for people are meant for.",
    ),
    key("groups_claim", "string", "`\"groups\"`", "The claim that says which groups somebody is in."),
    key(
        "roles",
        "table of arrays of strings",
        "required",
        "What each group may do here: `{ mesh-editors = [\"editor\"] }`. Each group is compared exactly; who is in none of them is nobody here.",
    ),
];

pub(super) const DEFAULTS: &[Key] = &[
    key(
        "isolate",
        "`\"auto\"`, `\"required\"` or `\"off\"`",
        "`\"auto\"`",
        "Whether each workload runs in a user and network namespace of its own, from which only the mesh can be reached. \
         `auto`: where the kernel allows it; `required`: or not at all; `off`: the addresses of `run.json` are reachable from the host.",
    ),
    key("workers", "1 to 256", "1", "Threads of each proxy."),
    key("max_staleness", "`\"1s\"` to `\"24h\"`", "`\"5m\"`", "For services that do not say."),
    key("recorded", "`\"best_effort\"` or `\"always\"`", "`\"best_effort\"`", "For services that do not say."),
    key("exchanges_max", "1 to 1000000", "10000", "For services that do not say."),
    key("tokens", "`\"optional\"` or `\"required\"`", "`\"optional\"`", "For services that do not say."),
];

pub(super) const SEAL: &[Key] =
    &[key("quorum", "1 to 16", "required", "How many operators must have signed a change, its author among them.")];

pub(super) const FACTORS: &[Key] = &[
    key(
        "authenticators",
        "array of strings",
        "required",
        "The AAGUIDs of the models that may be enrolled, each like `\"ee882879-721c-4913-9775-3dfcce97072a\"`. A comment says which is which.",
    ),
    key(
        "attestation_roots",
        "string",
        "required",
        "The root certificates of their makers, in PEM: who vouches that an authenticator is of the model it says.",
    ),
];

pub(super) const AUTHORITY: &[Key] = &[
    key(
        "svid_lifetime",
        "`\"5m\"` to `\"24h\"`",
        "`\"1h\"`",
        "Of each certificate of a workload, an agent, a control plane. It is renewed at half of it.",
    ),
    key(
        "intermediate_lifetime",
        "`\"7d\"` to `\"365d\"`",
        "`\"90d\"`",
        "Of what signs them. It is replaced when a third of it is left.",
    ),
    key(
        "root_lifetime",
        "`\"90d\"` to `\"7300d\"`",
        "`\"3650d\"`",
        "Of a root that is prepared from now on; at least twice that of an intermediate.",
    ),
];

pub(super) const SERVICE: &[Key] = &[
    key(
        "run",
        "array of strings",
        "it runs elsewhere",
        "The program and its arguments, started in the mesh directory. Without `port`, the environment variable `PORT` tells it \
         where to listen on 127.0.0.1. It stays on the host: the ledger never holds a command.",
    ),
    key("port", "1 to 65535", "told by `PORT`", "Where it listens on 127.0.0.1. Needed when there is no `run`."),
    key(
        "instances",
        "1 to 256",
        "1",
        "How many processes of it to run, each with a proxy of its own. More than one needs `run` and no `port`.",
    ),
    key(
        "env",
        "table of strings",
        "empty",
        "Added to the environment of `run`. The mesh itself sets `PORT` and `COUNTERSIGN_…`.",
    ),
    key(
        "protocol",
        "`\"http\"`, `\"grpc\"` or `\"tcp\"`",
        "`\"http\"`",
        "What it speaks. `http` is HTTP/1.1, HTTP/2 and WebSocket.",
    ),
    key(
        "mesh_port",
        "1 to 65535",
        "80; for `tcp` its `port`",
        "The port that callers use with its name, `NAME.mesh:PORT`. A `tcp` service without `port` has to give it.",
    ),
    key(
        "upstreams",
        "array of services",
        "empty",
        "The services it calls. Each gets a loopback listener, told as `COUNTERSIGN_UPSTREAM_<SERVICE>=127.0.0.1:port`. It grants nothing: policies do.",
    ),
    key(
        "contract",
        "path, `\"none\"`",
        "not said",
        "The file below the mesh directory that says which operations it has: an OpenAPI document (`.yaml`, `.yml`, `.json`), for `grpc` \
         a descriptor set (`.binpb`, `.pb`, `.desc`). A request that is none of them is denied: [contracts.md](contracts.md). \
         `\"none\"`: it has none on purpose; a new http or grpc service of a protected mesh says one or the other before it is let in.",
    ),
    key(
        "first_contact",
        "`\"mark\"`, `\"inspect\"` or `\"hold\"`",
        "`\"mark\"`",
        "The first exchange of a caller by one operation (without a contract: method and class of path) is marked in its record and reported. With `\"inspect\"` it \
         must also be small and plain, or is refused (`first-contact`). With `\"hold\"` every exchange of it is refused (`edge-held`) until an operator approves the \
         edge: [onboarding.md](onboarding.md#first-contact).",
    ),
    key(
        "attest",
        "array of tables",
        "none",
        "Processes that are this service although no agent started them: see below. With it neither `run` nor `port` is needed.",
    ),
    key("namespace", "name", "none", "Groups services for policies: `resource in Namespace::\"…\"`."),
    key(
        "sensitivity",
        "name",
        "none",
        "The class of the data it holds, for policies: `resource in Sensitivity::\"pci\"`.",
    ),
    key(
        "max_staleness",
        "`\"1s\"` to `\"24h\"`",
        "`[defaults]`",
        "How long its proxies go on when they hear nothing from the control plane. Then they answer 503.",
    ),
    key(
        "recorded",
        "`\"best_effort\"` or `\"always\"`",
        "`[defaults]`",
        "What happens when a decision record finds no room: `best_effort` counts it and goes on. With `always` an exchange is forwarded once its record is written, and answered 503 when it cannot be.",
    ),
    key(
        "exchanges_max",
        "1 to 1000000",
        "`[defaults]`",
        "Most exchanges open at once in each of its proxies; beyond it 503.",
    ),
    key(
        "tokens",
        "`\"optional\"` or `\"required\"`",
        "`[defaults]`",
        "Whether a request is permitted only with an [access token](tokens.md) of the mesh, which the sidecars of callers that declare this service in `upstreams` attach by themselves.",
    ),
];

pub(super) const ATTEST: &[Key] = &[
    key(
        "selectors",
        "array of strings",
        "required",
        "What such a process has, all of it: `unix:uid:1000`, `unix:gid:1000`, `systemd:id:envoy.service`, `cgroup:/…` or `container:…`, \
         at least one of which says who runs it; beside these `unix:path:/usr/bin/envoy` and `unix:sha256:…`.",
    ),
    key("host", "host", "any", "The only host on which it holds."),
];

pub(super) const ROLES: &[Key] = &[key("roles", "table", "", "")];

pub(super) const ROLE: &[Key] = &[key(
    "members",
    "array of strings",
    "required",
    "Who has the role: a service of this mesh by its name, or any workload by its SPIFFE ID.",
)];

pub(super) const ROUTES: &[Key] = &[key("routes", "table", "", "")];

pub(super) const ROUTE: &[Key] = &[
    key("service", "service", "required", "The service as the caller names it."),
    key("path", "path", "any", "Matches this path exactly, in its normal form."),
    key(
        "path_prefix",
        "path",
        "any",
        "Matches this path and what lies below it: `/items` matches `/items/4` and not `/itemsets`.",
    ),
    key("methods", "array of strings", "any", "Matches these methods."),
    key(
        "headers",
        "table of strings",
        "any",
        "Matches when each of these headers has exactly this value. Names in lower case.",
    ),
    key(
        "split",
        "table of weights, 1 to 10000",
        "all to `service`",
        "Where matching requests go: `{ catalog = 95, catalog-next = 5 }`. The service picked here is judged and reached; its own rules are not asked again.",
    ),
    key(
        "timeout",
        "`\"1ms\"` to `\"1h\"`",
        "none",
        "Longest time from the head of the request to the head of the response; then 504.",
    ),
    key("retry", "table", "no retries", "When a failed attempt may be tried again. Only where it is safe: see below."),
    key(
        "limit",
        "table",
        "none",
        "How much each caller may take of this rule; beyond it 429. See below for whom it counts.",
    ),
];

pub(super) const RETRY: &[Key] = &[
    key(
        "attempts",
        "1 to 10",
        "required",
        "Attempts beyond the first, each on another instance where there is one. Only when the connection failed, the server said that it did not \
         process the request, or the method is idempotent and no byte of a response came.",
    ),
    key(
        "budget_percent",
        "1 to 100",
        "20",
        "Retries allowed as a share of requests, so that a failing service is not flooded.",
    ),
];

pub(super) const LIMIT: &[Key] = &[
    key("rate_per_second", "1 to 1000000", "none", "Requests per second, sustained."),
    key("burst", "1 to 1000000", "0", "Requests that may come at once beyond the rate."),
    key("concurrent_max", "1 to 1000000", "none", "Exchanges open at the same time."),
];
