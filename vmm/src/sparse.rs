//! Writes files in which runs of zeros take no room: a guest's memory is mostly zeros.

use std::fs::File;
use std::io::{self, Seek, SeekFrom, Write};

/// Zeros are looked for in pieces of this many bytes, at multiples of it: a file system's usual block.
const BLOCK: usize = 4096;
/// Bytes that are held before they are written.
const BUFFER: usize = 64 * BLOCK;

/// A new, empty file that is written from its start.
#[derive(Debug)]
pub struct SparseFile {
    file: File,
    held: Vec<u8>,
    /// Bytes that were written or left out so far.
    len: u64,
}

impl SparseFile {
    /// Writes to `file`, which must be empty.
    #[must_use]
    pub fn new(file: File) -> Self {
        Self {
            file,
            held: Vec::with_capacity(BUFFER),
            len: 0,
        }
    }

    /// Writes what is held and gives the file its length; that length.
    ///
    /// # Errors
    /// What the system says.
    pub fn finish(mut self) -> io::Result<u64> {
        self.spill()?;
        self.file.set_len(self.len)?;
        Ok(self.len)
    }

    /// Writes what is held, but for its blocks of zeros.
    fn spill(&mut self) -> io::Result<()> {
        let mut at = self.len;
        for run in self.held.chunk_by_blocks() {
            if run.iter().any(|byte| *byte != 0) {
                self.file.seek(SeekFrom::Start(at))?;
                self.file.write_all(run)?;
            }
            at += run.len() as u64;
        }
        self.len = at;
        self.held.clear();
        Ok(())
    }
}

/// Splits bytes into runs of blocks that are all zeros, or all not.
trait Runs {
    fn chunk_by_blocks(&self) -> impl Iterator<Item = &[u8]>;
}

impl Runs for Vec<u8> {
    fn chunk_by_blocks(&self) -> impl Iterator<Item = &[u8]> {
        let mut rest = self.as_slice();
        std::iter::from_fn(move || {
            let is_zero = |block: &[u8]| block.iter().all(|byte| *byte == 0);
            let mut blocks = rest.chunks(BLOCK);
            let first = is_zero(blocks.next()?);
            let same = blocks.take_while(|block| is_zero(block) == first);
            let len = (BLOCK * (same.count() + 1)).min(rest.len());
            let (run, after) = rest.split_at_checked(len)?;
            rest = after;
            Some(run)
        })
    }
}

impl Write for SparseFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let room = BUFFER - self.held.len();
        let taken = bytes.get(..room).unwrap_or(bytes);
        self.held.extend_from_slice(taken);
        if self.held.len() == BUFFER {
            self.spill()?;
        }
        Ok(taken.len())
    }

    /// Nothing is promised before [`SparseFile::finish`].
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::{BLOCK, BUFFER, SparseFile};
    use std::io::Write;
    use std::os::unix::fs::MetadataExt;

    use proptest::prelude::{Just, Strategy, prop_oneof, proptest};

    /// Writes the pieces; the file must read as they are.
    fn check(pieces: &[Vec<u8>]) -> u64 {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        let mut sparse = SparseFile::new(std::fs::File::create(&path).unwrap());
        for piece in pieces {
            sparse.write_all(piece).unwrap();
        }
        let len = sparse.finish().unwrap();
        let read = std::fs::read(&path).unwrap();
        assert!(read == pieces.concat());
        assert_eq!(len, read.len() as u64);
        std::fs::metadata(&path).unwrap().blocks() * 512
    }

    #[test]
    fn zeros_take_no_room() {
        assert_eq!(check(&[]), 0);
        assert_eq!(check(&[vec![0; 10 * BUFFER + 5]]), 0);
        let room = check(&[vec![1; 5], vec![0; 10 * BUFFER], vec![1; 5]]);
        assert!(room <= 4 * BLOCK as u64, "{room}");
    }

    proptest! {
        #[test]
        fn a_file_reads_as_it_was_written(
            pieces in proptest::collection::vec(
                (prop_oneof![Just(0_u8), Just(1)], 0..3 * BLOCK).prop_map(|(byte, len)| vec![byte; len]),
                0..40,
            )
        ) {
            check(&pieces);
        }
    }
}
