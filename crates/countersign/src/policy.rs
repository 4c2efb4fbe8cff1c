//! `policy schema`, and the law of a mesh for whoever judges again.

use clap::Subcommand;

use countersign_api::local::Mesh;
use countersign_core::{
    change::Bodies,
    identity::ServiceName,
    policy::{self as law, Law, Library},
    view::{self, Local},
};

use crate::{
    error::{Done, Failure},
    render,
};

/// What can be done with policies.
#[derive(Debug, Subcommand)]
pub enum PolicyVerb {
    /// Print the Cedar schema that policies are validated against
    Schema,
}

/// Does it.
pub fn policy(verb: PolicyVerb) -> Done {
    match verb {
        PolicyVerb::Schema => {
            render::print(law::schema_text());
            Ok(())
        }
    }
}

/// Every text of `bodies`, parsed.
pub fn library(bodies: &Bodies) -> Result<Library, Failure> {
    let mut library = Library::default();
    for (digest, text) in bodies.iter() {
        library.insert(*digest, text).map_err(|e| Failure::new("a policy of the mesh cannot be read").cause(e))?;
    }
    Ok(library)
}

/// The law of one service of `mesh`.
pub fn law_of(mesh: &Mesh, service: &ServiceName) -> Result<Law, Failure> {
    let could_not = || Failure::new(format!("could not compile the policies of revision {}", mesh.revision));
    let library = library(&mesh.bodies)?;
    let local = Local { service: service.clone() };
    let view = view::view(&mesh.state, mesh.revision, &library, &local).map_err(|e| could_not().because(&e))?;
    Law::compile(&view).map_err(|errors| errors.iter().fold(could_not(), |failure, e| failure.cause(e.to_string())))
}
