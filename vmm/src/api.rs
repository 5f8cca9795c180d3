//! The API: HTTP with JSON on a unix socket. It converts at the edge: nothing below it knows JSON.

mod convert;
#[cfg(test)]
mod damaged;
#[cfg(test)]
pub(crate) mod double;
pub mod error;
mod events;
mod extract;
pub mod live;
pub mod machine;
mod metrics;
pub mod openapi;
mod routes;
pub mod server;
pub mod socket;
#[cfg(test)]
mod tests;
pub mod wire;
