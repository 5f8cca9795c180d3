//! The API: HTTP with JSON on a unix socket. It converts at the edge: nothing below it knows JSON.

mod convert;
#[cfg(test)]
mod damaged;
#[cfg(test)]
mod double;
pub mod error;
mod events;
mod extract;
pub mod live;
pub mod machine;
pub mod openapi;
mod routes;
pub mod server;
pub mod socket;
#[cfg(test)]
mod tests;
pub mod wire;
