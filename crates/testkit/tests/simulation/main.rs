//! Publish and acknowledge under everything that a network, a disk and an operator can do: one schedule for each seed,
//! the same every time. A failure prints its seed; `SIMULATION_SEED=n` runs that one alone, `SIMULATION_SEEDS=n` more of
//! them.

mod mesh;

use std::{collections::BTreeMap, env, ops::Range, thread};

use mesh::{Mesh, Spare};

/// Schedules unless told otherwise.
const SEEDS: u64 = 100;
/// Steps of one schedule, before everything heals.
const STEPS: usize = 150;

struct Seed(u64);

impl Drop for Seed {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("the schedule of seed {0} fails: SIMULATION_SEED={0}", self.0);
        }
    }
}

/// Runs each seed's schedule, then `end`; returns how often what happened.
fn simulate(seeds: Range<u64>, end: impl Fn(&mut Mesh)) -> BTreeMap<&'static str, u64> {
    let mut happened = BTreeMap::new();
    let mut spare = Spare::default();
    for seed in seeds {
        let _seed = Seed(seed);
        let mut mesh = Mesh::new(seed, spare);
        for _ in 0..STEPS {
            mesh.step();
        }
        end(&mut mesh);
        for (what, count) in &mesh.happened {
            *happened.entry(*what).or_default() += count;
        }
        spare = mesh.into_spare();
    }
    happened
}

/// PROVES (followed): after every step each host's follower equals the fold of the ledger at its revision, whatever was
/// lost, doubled, overtaken, altered or forged on the way to it; and what its proxies enforce is the view of that fold.
#[test]
fn whatever_happens_on_the_way_every_proxy_ends_at_the_newest_revision() {
    let number = |name: &str| env::var(name).ok().map(|number| number.parse::<u64>().unwrap());
    let one = number("SIMULATION_SEED");
    let seeds = one.map_or(0..number("SIMULATION_SEEDS").unwrap_or(SEEDS), |seed| seed..seed + 1);
    let happened = simulate(seeds, |mesh| {
        mesh.heal();
        let head = mesh.head();
        for host in &mesh.hosts {
            assert_eq!(host.follower, *mesh.truth.at(head), "host {} does not converge", host.name);
        }
        for proxy in mesh.proxies() {
            assert_eq!(proxy.revision, head, "{} does not converge", proxy.instance);
            mesh.truth.hold(proxy, mesh.now_ms);
            assert_ne!(proxy.answer("web", mesh.now_ms), 503, "{} still refuses", proxy.instance);
        }
        let running = mesh.proxies().map(|proxy| (proxy.instance.clone(), head)).collect();
        assert_eq!(mesh.believed(), running, "control knows exactly the proxies that run, and what they enforce");
        assert!(mesh.wait_says_enforced(head));
    });
    if one.is_none() {
        assert_eq!(happened.len(), 11, "everything happens in some schedule: {happened:#?}");
    }
}

#[test]
fn the_same_seed_is_the_same_schedule() {
    let root = |seed| {
        let mut mesh = Mesh::new(seed, Spare::default());
        (0..STEPS).for_each(|_| mesh.step());
        (mesh.now_ms, mesh.truth.at(mesh.head()).root(), mesh.happened)
    };
    assert_eq!(root(7), root(7));
    assert_ne!(root(7), root(8));
}

#[test]
fn a_proxy_cut_off_serves_up_to_max_staleness_and_a_restart_of_its_agent_buys_no_time() {
    let mut mesh = Mesh::new(1, Spare::default());
    mesh.heal();
    let serves = |mesh: &Mesh| mesh.hosts[0].proxies[0].answer("web", mesh.now_ms) != 503;
    mesh.keep(0);
    mesh.hosts[0].is_cut_off = true;
    for second in 1..=10 {
        mesh.pass(1_000);
        assert_eq!(serves(&mesh), second < 5, "after {second} s; `max_staleness` is 5 s");
    }
    mesh.restart_host(0);
    mesh.settle();
    assert_eq!(mesh.hosts[0].proxies[0].revision, mesh.head(), "what was kept is enforced");
    assert!(!serves(&mesh), "and is as old as before");
    mesh.heal();
    assert!(serves(&mesh));
}

#[test]
fn wait_goes_on_until_the_last_connected_proxy_enforces() {
    let mut mesh = Mesh::new(1, Spare::default());
    mesh.heal();
    assert!(mesh.wait_says_enforced(mesh.head()));
    mesh.hosts[1].is_cut_off = true;
    mesh.change();
    mesh.settle();
    assert!(!mesh.wait_says_enforced(mesh.head()), "a proxy that is out of reach and not yet given up is behind");
    let before = mesh.hosts[1].proxies[0].revision;
    assert!(before < mesh.head() && mesh.believed()[&mesh.hosts[1].proxies[0].instance] == before);
    mesh.heal();
    assert!(mesh.wait_says_enforced(mesh.head()));
}
