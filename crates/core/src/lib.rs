//! The law of the mesh, as pure functions.
//!
//! Reads no clock, draws no random number, opens no file or socket, starts no thread: `now` and nonces are
//! arguments. Everything that another crate enforces, serves or stores is defined here.
//!
//! | room | holds |
//! |---|---|
//! | [`identity`] | trust domains, SPIFFE IDs, service and instance names |
//! | [`canonical`] | RFC 8785 encoding and the digests made over it |
//! | [`change`] | what an operator can ask for: [`change::Change`], [`change::ChangeSet`] |
//! | [`contract`] | the operations of a service, and which of them a request is |
//! | [`countersignature`] | an operator's signature over one change-set, and what voids it |
//! | [`keyring`] | the operators' keys and the seal, folded from the ledger |
//! | [`state`] | [`state::MeshState`], the pure fold of all admitted changes |
//! | [`assurance`] | what an operator has proven: factors, challenges, WebAuthn assertions |
//! | [`ledger`] | the Merkle log: entries, proofs, notes, checkpoints, tiles, witnesses |
//! | [`difference`] | what a change replaces and what it brings, as texts for people |
//! | [`directory`] | a mesh directory (`mesh.toml`, policies, roles, routes) parsed, with every mistake at once |
//! | [`operator`] | operators as the ledger knows them: roles, factors, public keys, the seal |
//! | [`jws`] | signed tokens taken apart, and the keys that verify them |
//! | [`jwt_svid`] | whom a JWT-SVID speaks for, and to whom |
//! | [`client`] | clients of the token service that are no workloads, and the keys that they are known by |
//! | [`pipeline`] | whose tokens are believed, and which automations may propose changes |
//! | [`sign_in`] | the providers that people sign in with, and which groups there mean which roles |
//! | [`gate`] | the change gate: who may change what, and what they have to show for it |
//! | [`policy`] | the request gate: the schema, the compiled law, the decision and its explanation, lint and tests |
//! | [`route`] | traffic rules as data |
//! | [`path`] | the one normal form of a request path |
//! | [`view`] | what one proxy needs of the mesh at one revision |
//! | [`signal`] | what holds at once and for a while: certificates and tokens that are revoked, and what is said of somebody |
//! | [`risk`] | what is said of a subject, added up |
//! | [`token`] | access tokens: what they say, whom they are bound to, and why one is not believed |
//! | [`oauth`] | what the token service may give a client, and its tokens as others read them |
//! | [`record`] | the record of one decision |
//! | [`registration`] | which processes are a service although no agent started them |

pub mod assurance;
pub mod canonical;
pub mod change;
pub mod client;
pub mod contract;
pub mod countersignature;
pub mod difference;
pub mod directory;
pub mod gate;
pub mod identity;
pub mod jws;
pub mod jwt_svid;
pub mod keyring;
pub mod ledger;
pub mod lifetimes;
pub mod oauth;
pub mod operator;
pub mod path;
pub mod pipeline;
pub mod policy;
pub mod record;
pub mod registration;
pub mod risk;
pub mod route;
pub mod service;
pub mod sign_in;
pub mod signal;
pub mod state;
pub mod token;
pub mod view;
