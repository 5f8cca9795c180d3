//! Serves the API: HTTP/1.1 on a unix socket, on a thread of its own.
//!
//! Limits for clients that are slow or many: 64 connections, 5 seconds for a request's head, 32 KiB of headers.
//! When it ends, event streams end after their last event, and answers under way are given a second to be sent.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use axum::Router;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::{UnixListener, UnixStream};
use tokio::runtime::Runtime;
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;

use super::machine::Machine;
use super::routes::{self, Api};
use super::socket::{Socket, SocketError};

/// Connections served at once; more wait to be accepted.
const CONNECTIONS: usize = 64;
/// How long a request's head may take to arrive.
const HEAD_TIMEOUT: Duration = Duration::from_secs(5);
/// Largest head of a request, in bytes.
const HEAD_LIMIT: usize = 32 << 10;
/// Threads for calls that block.
const BLOCKING_THREADS: usize = 8;
/// Stack of each of our threads, in bytes.
const STACK: usize = 512 << 10;
/// How long answers under way are waited for at the end.
const LAST_ANSWERS: Duration = Duration::from_secs(1);

/// Why the server could not start.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// The socket could not be opened.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// The system has no thread or descriptor left.
    #[error("cannot start the API's thread: {0} (see ulimit -u and ulimit -n)")]
    Thread(#[source] io::Error),
}

/// An open socket that is not served yet: calls wait.
#[derive(Debug)]
pub struct Listening {
    runtime: Runtime,
    listener: UnixListener,
    socket: Socket,
}

/// A running server. Dropping it stops it and removes the socket's file.
#[derive(Debug)]
pub struct Server {
    stop: watch::Sender<bool>,
    thread: Option<JoinHandle<()>>,
    socket: Socket,
}

impl Listening {
    /// Opens the socket at `path`.
    ///
    /// # Errors
    /// When the socket cannot be had.
    pub fn open(path: &Path) -> Result<Self, ServerError> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_io()
            .enable_time()
            .max_blocking_threads(BLOCKING_THREADS)
            .thread_stack_size(STACK)
            .thread_keep_alive(Duration::from_secs(1))
            .thread_name("api-call")
            .build()
            .map_err(ServerError::Thread)?;
        let (listener, socket) = {
            let _context = runtime.enter();
            Socket::bind(path)?
        };
        Ok(Self {
            runtime,
            listener,
            socket,
        })
    }

    /// Serves `machine` from now on.
    ///
    /// # Errors
    /// When there is no thread to be had.
    pub fn serve(self, machine: Arc<dyn Machine>) -> Result<Server, ServerError> {
        let Self {
            runtime,
            listener,
            socket,
        } = self;
        let (stop, stopped) = watch::channel(false);
        let router = routes::router(Api::new(machine, stopped.clone()));
        let thread = std::thread::Builder::new()
            .name("api".to_owned())
            .stack_size(STACK)
            .spawn(move || {
                runtime.block_on(serve(listener, router, stopped));
                runtime.shutdown_background();
            })
            .map_err(ServerError::Thread)?;
        Ok(Server {
            stop,
            thread: Some(thread),
            socket,
        })
    }
}

impl Server {
    /// Where the server listens.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.socket.path()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.send_replace(true);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the API's thread panicked");
        }
    }
}

/// Accepts connections until `stop` becomes true, then waits for the answers under way.
async fn serve(listener: UnixListener, router: Router, mut stop: watch::Receiver<bool>) {
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    let mut connections = JoinSet::new();
    loop {
        let place = tokio::select! {
            place = Arc::clone(&places).acquire_owned() => place,
            _ = stop.changed() => break,
        };
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            _ = stop.changed() => break,
        };
        match accepted {
            Ok((stream, _peer)) => {
                let connection = connection(stream, router.clone(), stop.clone());
                connections.spawn(async move {
                    connection.await;
                    drop(place);
                });
            }
            Err(cause) => {
                // Out of descriptors, most likely: give those in use a chance to be closed.
                tracing::warn!(%cause, "an API connection could not be accepted");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
        while connections.try_join_next().is_some() {}
    }
    drop(listener);
    let all = async { while connections.join_next().await.is_some() {} };
    if tokio::time::timeout(LAST_ANSWERS, all).await.is_err() {
        tracing::warn!("API connections were cut off with answers under way");
    }
}

/// Serves one connection until its client closes it, breaks a limit, or the server stops.
async fn connection(stream: UnixStream, router: Router, mut stop: watch::Receiver<bool>) {
    let mut http = hyper::server::conn::http1::Builder::new();
    http.timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .max_buf_size(HEAD_LIMIT);
    let service = TowerToHyperService::new(router);
    let mut serving = std::pin::pin!(http.serve_connection(TokioIo::new(stream), service));
    let ended = tokio::select! {
        ended = serving.as_mut() => ended,
        _ = stop.changed() => {
            serving.as_mut().graceful_shutdown();
            serving.await
        }
    };
    if let Err(cause) = ended {
        tracing::debug!(%cause, "an API connection ended");
    }
}
