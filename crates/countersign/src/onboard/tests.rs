//! A mesh directory in a repository and a service beside it: what is written, what stays, and what is refused.

use super::*;
use crate::render::Paint;

const MESH: &str = "\
# Our mesh.
trust_domain = \"tiny.example\"

[services.web]
run = [\"python3\", \"web.py\"]
upstreams = [\"payments\"]

[services.cron]
port = 9001
";
const OPENAPI: &str = r#"{"openapi":"3.1.0","info":{"title":"p","version":"1"},"paths":{
  "/charges":{"get":{"operationId":"listCharges"},"post":{"operationId":"createCharge"}},
  "/charges/{id}":{"get":{}},
  "/charges/{id}/refund":{"post":{"operationId":"refund \"all\""}}}}"#;

/// A mesh directory in a repository, and a service beside it.
fn ground() -> (tempfile::TempDir, PathBuf, PathBuf) {
    let root = tempfile::tempdir().unwrap();
    let base = root.path().canonicalize().unwrap();
    let (mesh, service) = (base.join("repo/mesh"), base.join("payments"));
    fs::create_dir_all(base.join("repo/.git")).unwrap();
    fs::create_dir_all(&mesh).unwrap();
    fs::create_dir_all(service.join("api")).unwrap();
    fs::write(mesh.join(MESH_FILE), MESH).unwrap();
    fs::write(service.join("api/openapi.json"), OPENAPI).unwrap();
    (root, mesh, service)
}

fn place(mesh: &Path) -> Place {
    crate::mesh_finder::at(mesh, None).unwrap()
}

fn arguments(service: &Path) -> OnboardArguments {
    OnboardArguments {
        service_dir: service.to_owned(),
        name: None,
        contract: None,
        caller: Vec::new(),
        port: 8080,
        sensitivity: Some("pci".into()),
        namespace: None,
        control: "https://10.0.0.1:7443".into(),
        pipelines: "https://10.0.0.1:7450".into(),
        image: "registry.example/payments:1".into(),
        run: vec!["./payments".into(), "--greeting".into(), "50% of $HOME \"now\"".into()],
    }
}

fn files_of(dir: &Path) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    let mut folders = vec![dir.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            match path.is_dir() {
                true => folders.push(path),
                false => drop(found.insert(path.strip_prefix(dir).unwrap().to_str().unwrap().to_owned())),
            }
        }
    }
    found
}

#[test]
fn a_service_is_onboarded_whole_and_its_callers_have_what_only_reads_until_somebody_says_more() {
    let (root, mesh, service) = ground();
    let mut arguments = arguments(&service);
    arguments.caller = vec!["cron=createCharge,refund \"all\"".into()];
    onboard(&arguments, &place(&mesh), Output::Json).unwrap();
    let base = root.path().canonicalize().unwrap();
    let expected = [
        "payments/api/openapi.json",
        "payments/deploy/kubernetes.yaml",
        "payments/deploy/payments.service",
        "repo/.github/workflows/mesh.yml",
        "repo/.gitlab-ci.yml",
        "repo/mesh/contracts/payments.json",
        "repo/mesh/mesh.toml",
        "repo/mesh/policies/payments.cedar",
        "repo/mesh/tests/payments.toml",
    ];
    assert_eq!(files_of(&base), expected.map(str::to_owned).into());
    let directory = mesh_directory::load(&mesh).unwrap();
    let (tested, mistakes) = policy::run_tests(&directory).unwrap();
    assert!(mistakes.is_empty() && tested.iter().all(|test| test.holds), "{tested:?}");
    let names: Vec<&str> = tested.iter().map(|test| &*test.name).collect();
    assert_eq!(
        names,
        [
            "cron calls payments by createCharge",
            "cron calls payments by refund \"all\"",
            "cron does not call payments by GET /charges/{id}",
            "web calls payments by GET /charges/{id}",
            "web calls payments by listCharges",
            "web does not call payments by createCharge",
            "spiffe://tiny.example/somebody-else does not call payments by GET /charges/{id}",
        ]
    );
    let policies: BTreeSet<&str> = directory.policies.keys().map(|id| &**id).collect();
    let expected = [
        "cron-payments-createCharge",
        "cron-payments-refund--all",
        "web-payments-GET--charges--id",
        "web-payments-listCharges",
    ];
    assert_eq!(policies, expected.into());
    let spec = &directory.services[&ServiceName::parse("payments").unwrap()].spec;
    assert!(spec.contract.is_some() && spec.sensitivity.as_deref() == Some("pci"));
    let calls = |caller: &str| &directory.services[&ServiceName::parse(caller).unwrap()].spec.upstreams;
    assert!(calls("cron").len() == 1 && calls("web").len() == 1, "a caller declares whom it calls");
    let text = fs::read_to_string(mesh.join(MESH_FILE)).unwrap();
    assert!(text.starts_with("# Our mesh.\n") && text.contains("contract = \"contracts/payments.json\""), "{text}");
    let unit = fs::read_to_string(service.join("deploy/payments.service")).unwrap();
    assert!(unit.contains(r#"-- ./payments --greeting "50%% of $$HOME \"now\"""#), "{unit}");
    let workflow = fs::read_to_string(base.join("repo/.github/workflows/mesh.yml")).unwrap();
    assert!(
        workflow.contains("plan proposed/mesh --from base/mesh") && workflow.contains("propose mesh --ci"),
        "{workflow}"
    );

    // Everything that it would uncomment is a policy, too.
    let cedar = fs::read_to_string(mesh.join("policies/payments.cedar")).unwrap();
    fs::write(mesh.join("policies/payments.cedar"), cedar.replace("// @id", "@id").replace("// permit", "permit"))
        .unwrap();
    assert_eq!(mesh_directory::load(&mesh).unwrap().policies.len(), 8);

    let again = onboard(&arguments, &place(&mesh), Output::Json).unwrap_err().render(Output::Text, Paint::plain());
    assert!(again.contains("service `payments` is declared already"), "{again}");
}

#[test]
fn a_grpc_service_is_onboarded_by_its_descriptor_set_and_files_that_are_there_stay() {
    let (_root, mesh, service) = ground();
    fs::remove_file(service.join("api/openapi.json")).unwrap();
    // package s; service S { rpc GetA (...); rpc Place (...); }
    let method = |name: &[u8]| [&[0x12, name.len() as u8 + 2, 0x0a, name.len() as u8], name].concat();
    let methods = [method(b"GetA"), method(b"Place")].concat();
    let service_of = [&[0x0a, 0x01, b'S'][..], &methods].concat();
    let file = [&[0x12, 0x01, b's', 0x32, service_of.len() as u8][..], &service_of].concat();
    let set = [&[0x0a, file.len() as u8][..], &file].concat();
    fs::write(service.join("descriptor.binpb"), set).unwrap();
    fs::write(mesh.parent().unwrap().join(".gitlab-ci.yml"), "ours: true\n").unwrap();
    onboard(&arguments(&service), &place(&mesh), Output::Json).unwrap();
    let directory = mesh_directory::load(&mesh).unwrap();
    assert_eq!(directory.policies.keys().map(|id| &**id).collect::<Vec<_>>(), ["web-payments-s-S-GetA"]);
    assert!(policy::run_tests(&directory).unwrap().0.iter().all(|test| test.holds));
    assert_eq!(fs::read_to_string(mesh.parent().unwrap().join(".gitlab-ci.yml")).unwrap(), "ours: true\n");
}

#[test]
fn what_would_be_no_mesh_directory_is_refused_with_what_to_do_and_nothing_is_written() {
    let with = |change: &dyn Fn(&Path, &Path, &mut OnboardArguments)| {
        let (root, mesh, service) = ground();
        let mut arguments = arguments(&service);
        change(&mesh, &service, &mut arguments);
        let before = files_of(root.path());
        let said = onboard(&arguments, &place(&mesh), Output::Json).unwrap_err().render(Output::Text, Paint::plain());
        assert_eq!(files_of(root.path()), before, "{said}");
        assert!(said.contains("help:"), "{said}");
        said
    };
    for (expected, change) in [
        (
            "no document of operations was found",
            &(|_: &Path, service: &Path, _: &mut OnboardArguments| {
                fs::remove_file(service.join("api/openapi.json")).unwrap()
            }) as &dyn Fn(&Path, &Path, &mut OnboardArguments),
        ),
        ("are both there", &|_, service, _| fs::write(service.join("openapi.yaml"), OPENAPI).unwrap()),
        ("is no document of operations", &|_, service, given| given.contract = Some(service.join("api/openapi.proto"))),
        ("cannot be the name of a service", &|_, _, given| given.name = Some("Pay!".into())),
        ("is no other service of mesh.toml", &|_, _, given| given.caller = vec!["gone".into()]),
        ("is no operation of the contract", &|_, _, given| given.caller = vec!["cron=createcharge".into()]),
        ("would have", &|_, service, _| {
            fs::write(service.join("api/openapi.json"), "{\"openapi\":\"3.1.0\"}").unwrap()
        }),
        ("would fail", &|mesh, _, _| {
            fs::create_dir(mesh.join("policies")).unwrap();
            fs::write(mesh.join("policies/all.cedar"), "@id(\"all\") permit (principal, action, resource);").unwrap();
        }),
        ("is there already", &|mesh, _, _| {
            fs::create_dir(mesh.join("contracts")).unwrap();
            fs::write(mesh.join("contracts/payments.json"), "x").unwrap();
        }),
        ("could not find", &|_, _, given| given.service_dir = "/nowhere/at/all".into()),
    ] {
        let said = with(change);
        assert!(said.contains(expected), "{expected}: {said}");
    }
}
