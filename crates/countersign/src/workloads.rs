//! `workload list`: what the agent of this host started, what it attested, and what it refused lately; of processes that it did not start,
//! what they are known by, as mesh.toml wants it.

use serde::Serialize;

use countersign_api::local::{ProcessView, WorkloadView};

use crate::{
    client::Client,
    error::Done,
    mesh_finder::Place,
    render::{self, Output, Paint, cell},
};

/// Both lists of one agent.
#[derive(Serialize)]
struct Listed {
    workloads: Vec<WorkloadView>,
    processes: Vec<ProcessView>,
}

/// Lists them.
pub async fn list(place: &Place, output: Output) -> Done {
    let agent = Client::agent(place);
    let (workloads, processes) = (agent.get("/v1/workloads").await?, agent.get("/v1/processes").await?);
    render::answer(output, &Listed { workloads, processes }, text)
}

fn text(listed: &Listed, paint: Paint) -> String {
    let started = listed.workloads.iter().map(|one| {
        vec![
            cell(&one.instance),
            cell(&one.state),
            cell(one.restarts),
            cell(one.last_exit.as_deref().unwrap_or_default()),
        ]
    });
    let mut text = render::table(&["STARTED HERE", "STATE", "RESTARTS", "LAST EXIT"], started, paint);
    for one in &listed.processes {
        let is = match &one.instance {
            Some(instance) => format!("{} {instance}", paint.good("attested:")),
            None => format!("{} no service registers it", paint.warn("refused:")),
        };
        let selectors: Vec<String> =
            one.selectors.iter().map(|selector| format!("  {:?},\n", selector.to_string())).collect();
        text += &format!("\nprocess {}, {is}\nselectors = [\n{}]\n", one.pid, selectors.concat());
    }
    text
}
