//! The API's socket file: private from its first moment, replaced when dead, never taken from a live owner.
//!
//! Guarantees: the file has mode 0600 as soon as it exists (Linux takes the mode of a socket's file from the socket's
//! own inode, so it is set before `bind`; see unix(7) and `unix_bind_bsd` in net/unix/af_unix.c). Two that start at
//! once on the same path are put in order by a lock on the directory. The file is removed on drop, if it is still ours.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use tokio::net::{UnixListener, UnixSocket};

/// `sun_path` of unix(7), less its terminating zero.
const LONGEST_PATH: usize = 107;
/// Connections that may wait to be accepted.
const BACKLOG: u32 = 64;

/// Why the socket could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// Somebody answers on it.
    #[error(
        "the API socket {path} is in use by a running exopatch: give this one another path with --api-sock, \
         or end the other (exopatch --api-sock {path} vm power-button)"
    )]
    InUse {
        /// The socket.
        path: PathBuf,
    },
    /// Something else has that name.
    #[error(
        "{path} exists and is not a socket: it is left alone; give another path with --api-sock"
    )]
    NotASocket {
        /// The file.
        path: PathBuf,
    },
    /// Unix sockets have short names.
    #[error(
        "the API socket's path {path} has {len} bytes; unix sockets allow {LONGEST_PATH}: give a shorter one"
    )]
    TooLong {
        /// The path.
        path: PathBuf,
        /// Its length in bytes.
        len: usize,
    },
    /// A step failed.
    #[error("cannot {step} the API socket {path}: {cause}{}", hint(.cause))]
    Step {
        /// What was being done.
        step: &'static str,
        /// The socket.
        path: PathBuf,
        /// The operating system's answer.
        cause: io::Error,
    },
}

fn hint(cause: &io::Error) -> &'static str {
    match cause.kind() {
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
            " (choose a directory that you can write to, with --api-sock)"
        }
        io::ErrorKind::NotFound => " (the directory does not exist: make it first)",
        _ => "",
    }
}

/// A listening socket and its file.
#[derive(Debug)]
pub struct Socket {
    path: PathBuf,
    /// Device and inode of the file that we made.
    identity: (u64, u64),
}

impl Socket {
    /// Listens at `path`. Needs the context of the runtime that will accept.
    ///
    /// # Errors
    /// When the path is taken by a live server or another kind of file, or cannot be bound.
    pub fn bind(path: &Path) -> Result<(UnixListener, Self), SocketError> {
        let step = |step| {
            move |cause| SocketError::Step {
                step,
                path: path.to_owned(),
                cause,
            }
        };
        let len = path.as_os_str().len();
        if len > LONGEST_PATH {
            return Err(SocketError::TooLong {
                path: path.to_owned(),
                len,
            });
        }
        let directory = match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        let locked = File::open(directory).map_err(step("open the directory of"))?;
        locked.lock().map_err(step("lock the directory of"))?;

        remove_dead(path)?;
        let socket = UnixSocket::new_stream().map_err(step("create"))?;
        let inode = socket
            .as_fd()
            .try_clone_to_owned()
            .map_err(step("create"))?;
        File::from(inode)
            .set_permissions(fs::Permissions::from_mode(0o600))
            .map_err(step("set the mode of"))?;
        socket.bind(path).map_err(step("bind"))?;
        let made = fs::symlink_metadata(path).map_err(step("examine"))?;
        let file = Self {
            path: path.to_owned(),
            identity: (made.dev(), made.ino()),
        };
        let listener = socket.listen(BACKLOG).map_err(step("listen on"))?;
        Ok((listener, file))
    }

    /// Where the socket is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        let ours = fs::symlink_metadata(&self.path)
            .is_ok_and(|found| (found.dev(), found.ino()) == self.identity);
        if ours && let Err(cause) = fs::remove_file(&self.path) {
            tracing::warn!(path = %self.path.display(), %cause, "the API socket's file stays behind");
        }
    }
}

/// Removes the file of a server that is gone. A file that answers, or is no socket, is refused.
fn remove_dead(path: &Path) -> Result<(), SocketError> {
    let step = |step| {
        move |cause| SocketError::Step {
            step,
            path: path.to_owned(),
            cause,
        }
    };
    match fs::symlink_metadata(path) {
        Err(missing) if missing.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(cause) => return Err(step("examine")(cause)),
        Ok(found) if !found.file_type().is_socket() => {
            return Err(SocketError::NotASocket {
                path: path.to_owned(),
            });
        }
        Ok(_) => {}
    }
    match UnixStream::connect(path) {
        Err(refused) if refused.kind() == io::ErrorKind::ConnectionRefused => {
            fs::remove_file(path).map_err(step("replace"))
        }
        Err(gone) if gone.kind() == io::ErrorKind::NotFound => Ok(()),
        // A full queue of connections is an answer as well.
        Err(full) if full.kind() == io::ErrorKind::WouldBlock => Err(SocketError::InUse {
            path: path.to_owned(),
        }),
        Err(cause) => Err(step("probe")(cause)),
        Ok(_) => Err(SocketError::InUse {
            path: path.to_owned(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::{Socket, SocketError};
    use std::fs;
    use std::os::unix::fs::{FileTypeExt, PermissionsExt};
    use std::path::Path;

    fn bind(path: &Path) -> Result<(tokio::net::UnixListener, Socket), SocketError> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_io()
            .build()
            .unwrap();
        let _context = runtime.enter();
        Socket::bind(path)
    }

    /// Prepares a directory, binds `name` in it, and compares the error's text (`None`: it must succeed).
    fn check(name: &str, prepare: impl FnOnce(&Path), error: Option<&str>) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join(name);
        prepare(&path);
        match (bind(&path), error) {
            (Ok((listener, socket)), None) => {
                let found = fs::symlink_metadata(&path).unwrap();
                assert!(found.file_type().is_socket());
                assert_eq!(found.permissions().mode() & 0o777, 0o600);
                drop((listener, socket));
                assert!(!path.exists(), "the file is removed on drop");
            }
            (Err(got), Some(wanted)) => {
                let text = got.to_string();
                assert!(text.contains(wanted), "{text:?} lacks {wanted:?}");
            }
            (got, wanted) => panic!("{name}: {got:?}, wanted error {wanted:?}"),
        }
    }

    #[test]
    fn a_path_is_taken_only_when_nobody_has_it() {
        check("free", |_| {}, None);
        check(
            "dead",
            |path| drop(std::os::unix::net::UnixListener::bind(path).unwrap()),
            None,
        );
        check(
            "file",
            |path| fs::write(path, "mine").unwrap(),
            Some("is not a socket"),
        );
        check(
            "directory",
            |path| fs::create_dir(path).unwrap(),
            Some("is not a socket"),
        );
        check(
            "link",
            |path| std::os::unix::fs::symlink("/nowhere", path).unwrap(),
            Some("is not a socket"),
        );
        check("gone/api", |_| {}, Some("make it first"));
        check(&"x".repeat(120), |_| {}, Some("give a shorter one"));
    }

    #[test]
    fn a_live_socket_is_refused_and_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("api");
        let live = std::os::unix::net::UnixListener::bind(&path).unwrap();
        assert!(matches!(bind(&path), Err(SocketError::InUse { .. })));
        assert!(std::os::unix::net::UnixStream::connect(&path).is_ok());
        drop(live);
    }

    #[test]
    fn a_file_that_took_our_place_is_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("api");
        let ours = bind(&path).unwrap();
        fs::remove_file(&path).unwrap();
        fs::write(&path, "another").unwrap();
        drop(ours);
        assert_eq!(fs::read(&path).unwrap(), b"another");
    }

    #[test]
    fn a_directory_that_cannot_be_written_is_reported() {
        // Not even root makes files in sysfs.
        let text = bind(Path::new("/sys/exopatch-test"))
            .unwrap_err()
            .to_string();
        assert!(text.contains("choose a directory"), "{text:?}");
    }
}
