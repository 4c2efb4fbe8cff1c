//! The texts of a new service. Names are DNS labels; whatever else comes from outside is quoted as the language of its file quotes.

use std::{collections::BTreeSet, fmt::Write as _};

use countersign_core::{contract::Operation, service::Protocol};

use super::{Callable, Onboarded};

impl Onboarded<'_> {
    /// One policy for each operation that a caller has; what it might need beside these, as a comment.
    pub(super) fn policies(&self) -> String {
        let mut text = format!(
            "// Who calls {0}, and by which operations. A proposal, from {1}: callers have what only reads unless somebody said more.\n\
             // What else a caller needs is taken in by removing the slashes before it.\n",
            self.name, self.contract
        );
        if self.callers.is_empty() {
            let _ = write!(text, "//\n// Nobody calls it yet: no policy permits anything.\n");
        }
        for (caller, callable) in &self.callers {
            let _ = write!(text, "\n// {caller}\n");
            let mut taken = BTreeSet::new();
            for operation in &self.operations {
                let mark = if callable.has(operation) { "" } else { "// " };
                let _ = write!(
                    text,
                    "{mark}@id({:?})\n{mark}permit (principal == Workload::{:?}, action, resource == Operation::{:?}); // {} {}\n",
                    id(caller.as_str(), self.name.as_str(), operation, &mut taken),
                    caller.as_str(),
                    format!("{}/{}", self.name, operation.name),
                    operation.method,
                    operation.path,
                );
            }
        }
        text
    }

    /// What each caller may and may not, and that nobody else may anything.
    pub(super) fn tests(&self) -> String {
        let mut text = format!("# What has to hold of {}: `countersign policy test`.\n", self.name);
        let mut test = |principal: &str, operation: &Operation, is_permitted: bool| {
            let action = match self.protocol {
                Protocol::Grpc => "grpc:call".to_owned(),
                Protocol::Http | Protocol::Tcp => format!("http:{}", operation.method),
            };
            let does = if is_permitted { "calls" } else { "does not call" };
            let _ = write!(
                text,
                "\n[[test]]\nname = {}\ngiven = {{ principal = {}, action = {}, service = {}, path = {} }}\nexpect = \"{}\"\n",
                quoted(&format!("{principal} {does} {} by {}", self.name, operation.name)),
                quoted(principal),
                quoted(&action),
                quoted(self.name.as_str()),
                quoted(&filled(&operation.path)),
                if is_permitted { "permit" } else { "deny" },
            );
            if is_permitted {
                let _ = writeln!(text, "operation = {}", quoted(&operation.name));
            }
        };
        for (caller, callable) in &self.callers {
            callable.permitted.iter().for_each(|operation| test(caller.as_str(), operation, true));
            let other = self.operations.iter().find(|operation| !callable.has(operation));
            other.into_iter().for_each(|operation| test(caller.as_str(), operation, false));
        }
        let stranger = format!("spiffe://{}/somebody-else", self.trust_domain);
        self.operations.first().into_iter().for_each(|operation| test(&stranger, operation, false));
        text
    }

    /// What a pull request changes, said without asking the mesh; and what is merged, proposed to it.
    pub(super) fn github(&self) -> String {
        let Self { mesh_dir, trust_domain, .. } = self;
        let (paths, below) = self.paths();
        format!(
            "name: mesh\n\
             on:\n  pull_request:\n    paths: [{paths}]\n  push:\n    branches: [main]\n    paths: [{paths}]\n\
             permissions:\n  contents: read\n\
             jobs:\n\
             \x20 plan:\n    if: github.event_name == 'pull_request'\n    runs-on: ubuntu-24.04\n    timeout-minutes: 10\n    steps:\n\
             \x20     - uses: actions/checkout@11bd71901bbe5b1630ceea73d27597364c9af683 # v4.2.2\n        with:\n          path: proposed\n          persist-credentials: false\n\
             \x20     - uses: actions/checkout@11bd71901bbe5b1630ceea73d27597364c9af683 # v4.2.2\n        with:\n          ref: ${{{{ github.base_ref }}}}\n          path: base\n          persist-credentials: false\n\
             \x20     - run: countersign policy test -C proposed{below}\n\
             \x20     - run: countersign plan proposed{below} --from base{below}   # asks no mesh: a pull request holds no token\n\
             \x20 propose:\n    if: github.event_name == 'push'\n    runs-on: ubuntu-24.04\n    environment: production\n\
             \x20   timeout-minutes: 60\n    concurrency: mesh        # one proposal at a time\n\
             \x20   permissions:\n      contents: read\n      id-token: write        # lets the job ask for a token that says who it is\n    steps:\n\
             \x20     - uses: actions/checkout@11bd71901bbe5b1630ceea73d27597364c9af683 # v4.2.2\n        with:\n          persist-credentials: false\n\
             \x20     - run: countersign policy test -C {mesh_dir}\n\
             \x20     - run: countersign propose {mesh_dir} --ci --wait 30m\n        env:\n\
             \x20         COUNTERSIGN_CONTROL: {control}\n          COUNTERSIGN_AUDIENCE: {audience}\n",
            control = quoted(&self.arguments.pipelines),
            audience = quoted(&format!("countersign:{trust_domain}")),
        )
    }

    /// The same for GitLab.
    pub(super) fn gitlab(&self) -> String {
        let Self { mesh_dir, trust_domain, .. } = self;
        let (_, below) = self.paths();
        let changes = if mesh_dir == "." { quoted("**/*") } else { quoted(&format!("{mesh_dir}/**/*")) };
        format!(
            "plan:\n  stage: test\n  rules:\n    - if: $CI_PIPELINE_SOURCE == \"merge_request_event\"\n      changes: [{changes}]\n\
             \x20 script:\n\
             \x20   - git fetch --depth 1 origin \"$CI_MERGE_REQUEST_TARGET_BRANCH_NAME\"\n\
             \x20   - git worktree add --detach ../mesh-base FETCH_HEAD\n\
             \x20   - countersign policy test -C {mesh_dir}\n\
             \x20   - countersign plan {mesh_dir} --from ../mesh-base{below}\n\
             \n\
             propose:\n  stage: deploy\n  environment: production\n  timeout: 1h            # the token lives as long as the job may run\n\
             \x20 rules:\n    - if: $CI_COMMIT_BRANCH == $CI_DEFAULT_BRANCH\n      changes: [{changes}]\n\
             \x20 id_tokens:\n    COUNTERSIGN_ID_TOKEN:\n      aud: {audience}\n\
             \x20 variables:\n    COUNTERSIGN_CONTROL: {control}\n\
             \x20 script:\n    - countersign policy test -C {mesh_dir}\n    - countersign propose {mesh_dir} --ci --wait 30m\n",
            control = quoted(&self.arguments.pipelines),
            audience = quoted(&format!("countersign:{trust_domain}")),
        )
    }

    /// The paths that matter, as a list of YAML; and the mesh directory below a checkout.
    fn paths(&self) -> (String, String) {
        match self.mesh_dir.as_str() {
            "." => (quoted("**"), String::new()),
            dir => (quoted(&format!("{dir}/**")), format!("/{dir}")),
        }
    }

    /// The service with its sidecar as a unit.
    pub(super) fn systemd(&self) -> String {
        let Self { name, trust_domain, arguments, .. } = self;
        let command: Vec<String> = arguments.run.iter().map(|word| unit_word(word)).collect();
        format!(
            "# {name} with its sidecar. The first start needs a join token, once: `countersign host invite --services {name}` says it;\n\
             # write COUNTERSIGN_JOIN=TOKEN into /etc/countersign/{name}.env (mode 0600), and remove the file when the service has joined.\n\
             [Unit]\n\
             Description={name}, a service of the mesh {trust_domain}\n\
             Wants=network-online.target\n\
             After=network-online.target\n\
             \n\
             [Service]\n\
             DynamicUser=yes\n\
             StateDirectory=countersign-{name}\n\
             Environment=COUNTERSIGN_DATA_DIR=%S/countersign-{name}\n\
             EnvironmentFile=-/etc/countersign/{name}.env\n\
             ExecStart=/usr/local/bin/countersign run --service {name} --control {control} -- {command}\n\
             Restart=on-failure\n\
             RestartSec=2\n\
             NoNewPrivileges=yes\n\
             ProtectHome=yes\n\
             PrivateTmp=yes\n\
             LimitCORE=0\n\
             \n\
             [Install]\n\
             WantedBy=multi-user.target\n",
            control = unit_word(&arguments.control),
            command = command.join(" "),
        )
    }

    /// The service with its sidecar as a pod that keeps what it proves itself by.
    pub(super) fn kubernetes(&self) -> String {
        let Self { name, arguments, .. } = self;
        let words = ["countersign", "run", "--service", name.as_str(), "--control", &arguments.control, "--"];
        let words = words.into_iter().chain(arguments.run.iter().map(String::as_str));
        let command: String = words.map(|word| format!("            - {}\n", quoted(word))).collect();
        format!(
            "# {name} with its sidecar. The first start needs a join token, once: `countersign host invite --host {name}-0 --services {name}`\n\
             # says it; `kubectl create secret generic {name}-join --from-literal=token=TOKEN`, and delete the secret when the pod has joined.\n\
             # The volume keeps what the pod proves itself by, so that it goes on when it is scheduled anew. Workloads have namespaces of their\n\
             # own where the cluster lets pods make user namespaces; elsewhere the pod is what separates them.\n\
             apiVersion: v1\nkind: Service\nmetadata:\n  name: {name}\nspec:\n  clusterIP: None\n  selector:\n    app: {name}\n\
             ---\n\
             apiVersion: apps/v1\nkind: StatefulSet\nmetadata:\n  name: {name}\n  labels:\n    app: {name}\nspec:\n  serviceName: {name}\n\
             \x20 replicas: 1\n  selector:\n    matchLabels:\n      app: {name}\n  template:\n    metadata:\n      labels:\n        app: {name}\n\
             \x20   spec:\n      automountServiceAccountToken: false\n      securityContext:\n        runAsNonRoot: true\n        runAsUser: 10001\n\
             \x20       fsGroup: 10001\n        seccompProfile:\n          type: RuntimeDefault\n      containers:\n\
             \x20       - name: {name}\n          image: {image}\n          command:\n{command}\
             \x20         env:\n            - name: COUNTERSIGN_DATA_DIR\n              value: /var/lib/countersign\n\
             \x20           - name: COUNTERSIGN_JOIN\n              valueFrom:\n                secretKeyRef:\n\
             \x20                 name: {name}-join\n                  key: token\n                  optional: true\n\
             \x20         securityContext:\n            allowPrivilegeEscalation: false\n            readOnlyRootFilesystem: true\n\
             \x20           capabilities:\n              drop: [\"ALL\"]\n\
             \x20         volumeMounts:\n            - name: state\n              mountPath: /var/lib/countersign\n\
             \x20           - name: tmp\n              mountPath: /tmp\n\
             \x20     volumes:\n        - name: tmp\n          emptyDir: {{}}\n\
             \x20 volumeClaimTemplates:\n    - metadata:\n        name: state\n      spec:\n        accessModes: [\"ReadWriteOnce\"]\n\
             \x20       resources:\n          requests:\n            storage: 256Mi\n",
            image = quoted(&arguments.image),
        )
    }
}

impl Callable {
    fn has(&self, operation: &Operation) -> bool {
        self.permitted.iter().any(|permitted| permitted.name == operation.name)
    }
}

/// A name for a policy that no other of these has.
fn id(caller: &str, service: &str, operation: &Operation, taken: &mut BTreeSet<String>) -> String {
    let plain = |c: char| if c.is_ascii_alphanumeric() || c == '_' { c } else { '-' };
    let slug: String = operation.name.chars().map(plain).collect();
    let id = format!("{caller}-{service}-{}", slug.trim_matches('-'));
    let mut unique = id.clone();
    let mut next = 2;
    while !taken.insert(unique.clone()) {
        unique = format!("{id}-{next}");
        next += 1;
    }
    unique
}

/// A path that an operation's template matches.
fn filled(template: &str) -> String {
    let mut path = String::new();
    let mut rest = template;
    while let Some((before, after)) = rest.split_once('{') {
        path.push_str(before);
        path.push('1');
        rest = after.split_once('}').map_or("", |(_, after)| after);
    }
    path + rest
}

/// As JSON has it, which YAML and TOML read alike.
fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

/// One word of a command of systemd (systemd.service(5), "Command lines"): no specifier, no variable, no escape of its own.
fn unit_word(word: &str) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_./:=,@+".contains(c);
    if !word.is_empty() && word.chars().all(is_plain) {
        return word.to_owned();
    }
    let mut quoted = String::from("\"");
    for c in word.chars() {
        match c {
            '"' | '\\' => quoted.extend(['\\', c]),
            '%' | '$' => quoted.extend([c, c]),
            '\n' => quoted.push_str("\\n"),
            c if c.is_control() => quoted.push_str(&format!("\\x{:02x}", u32::from(c))),
            c => quoted.push(c),
        }
    }
    quoted + "\""
}
