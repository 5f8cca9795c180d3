//! The guest's log: the records in the kernel's `printk` ring, without the guest's help.
//!
//! A ring of descriptors says for each record what state it is in and where its text lies in a second ring. Of a guest that
//! stands still every record that the kernel itself would show is read; one that is still being written is left out and
//! named; anything else that does not fit is an error.
//! Sources: kernel `kernel/printk/{printk_ringbuffer.c,printk_ringbuffer.h,printk.c}`.

use super::gather::Gather;
use super::locate::{Kernel, KernelError};
use super::memory::Memory;
use super::symbols::SymbolError;
use super::types::{TypeError, Types};
use crate::addr::Gva;
use crate::guest::ReadPhys;
use crate::x86::paging::PagingError;

/// The largest ring of descriptors that is followed, as a power of two.
const MAX_COUNT_BITS: u32 = 22;
/// The largest ring of texts (`LOG_BUF_LEN_MAX` is 2 GiB), as a power of two.
const MAX_SIZE_BITS: u32 = 31;
/// The upper two bits of a descriptor's state are the state, the rest is its number (`DESC_FLAGS_SHIFT`).
const STATE_SHIFT: u32 = 62;
const NUMBER: u64 = (1 << STATE_SHIFT) - 1;
/// Where a record's text is when it has none: an empty line.
const EMPTY_LINE: u64 = 3;
/// Before its text each record has its descriptor's number.
const BLOCK_HEAD: u64 = 8;
/// The caller was no task (`printk_caller_id()`).
const CALLER_CPU: u32 = 1 << 31;

/// Why the log cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// Something of the kernel could not be found, read, or is unsound.
    #[error("the kernel's log cannot be read: {0}")]
    Kernel(#[from] KernelError),
}

impl From<SymbolError> for LogError {
    fn from(error: SymbolError) -> Self {
        Self::Kernel(error.into())
    }
}

impl From<TypeError> for LogError {
    fn from(error: TypeError) -> Self {
        Self::Kernel(error.into())
    }
}

impl From<PagingError> for LogError {
    fn from(error: PagingError) -> Self {
        Self::Kernel(error.into())
    }
}

/// Who wrote a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Caller {
    /// The task with this thread id.
    Task(u32),
    /// This CPU, outside any task.
    Cpu(u32),
}

/// One record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// Its number since boot.
    pub seq: u64,
    /// Nanoseconds since boot, by the guest's clock.
    pub nanoseconds: u64,
    /// Its severity, from 0 (emergency) to 7 (debugging).
    pub level: u8,
    /// Where it is from: 0 is the kernel, others are as in syslog(3).
    pub facility: u8,
    /// Who wrote it.
    pub caller: Caller,
    /// Its text, without a newline at the end; what is not UTF-8 is replaced.
    pub text: String,
    /// The device that it is about: its subsystem and its name; empty when about none.
    pub device: (String, String),
    /// The kernel had no room for its text.
    pub lost_text: bool,
    /// Its writer may still go on with the line: the kernel itself does not show it yet.
    pub open: bool,
}

/// Why a record is not there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unwritten {
    /// Its writer has it in hand.
    BeingWritten,
    /// Its place was just being taken from an older record.
    BeingReserved,
}

/// The whole log, at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Log {
    /// The records, the oldest first.
    pub records: Vec<Record>,
    /// Descriptors without a record that could be read, and why.
    pub unwritten: Vec<(u64, Unwritten)>,
    /// Severities below this go to the guest's console; `None` when the kernel does not say.
    pub console_level: Option<u8>,
}

/// Reads the log of `kernel` in `guest`, which must stand still.
///
/// # Errors
/// When the kernel has no such ring, or it is unsound.
pub fn read<R: ReadPhys + ?Sized>(kernel: &Kernel, guest: &R) -> Result<Log, LogError> {
    let layout = LogLayout::resolve(kernel.image().types())?;
    let memory = Memory::new(kernel, guest)?;
    let console = kernel.image().symbols().optional("console_printk")?;
    let console_level = match console {
        Some(console) => u8::try_from(memory.u32(kernel.runtime(console.address))?).ok(),
        None => None,
    };
    let ring = Ring::read(&memory, &layout, kernel.symbol("prb")?)?;
    let mut log = Log {
        console_level,
        ..Log::default()
    };
    // Each text lies in the ring of texts alone, so that all together are no longer than it.
    let mut left = ring.text_size;
    for step in 0..=ring.newest.wrapping_sub(ring.oldest) & NUMBER {
        let number = ring.oldest.wrapping_add(step) & NUMBER;
        match ring.record(&memory, number)? {
            Found::Record(record, len) => {
                let unsound =
                    || ring.unsound("texts, which are together longer than their ring,", number);
                left = left.checked_sub(len).ok_or_else(unsound)?;
                log.records.push(record);
            }
            Found::Unwritten(why) => log.unwritten.push((number, why)),
            Found::Free => {}
        }
    }
    Ok(log)
}

/// Offsets, resolved once.
struct LogLayout {
    ring: RingLayout,
    descriptor: DescriptorLayout,
    info: InfoLayout,
}

struct RingLayout {
    count_bits: u64,
    descriptors: u64,
    infos: u64,
    newest: u64,
    oldest: u64,
    size_bits: u64,
    texts: u64,
}

struct DescriptorLayout {
    size: u64,
    state: u64,
    begin: u64,
    next: u64,
}

struct InfoLayout {
    size: u64,
    seq: u64,
    nanoseconds: u64,
    text_len: u64,
    facility: u64,
    /// Byte, first bit in it, bits.
    level: (u64, u8, u8),
    caller: u64,
    /// Subsystem and device: offset and bytes of each.
    device: Option<[(u64, u64); 2]>,
}

impl LogLayout {
    fn resolve(types: &Types) -> Result<Self, LogError> {
        let ring = |path: &str| types.offset_of("printk_ringbuffer", path);
        let info = |path: &str| types.offset_of("printk_info", path);
        let descriptor = |path: &str| types.offset_of("prb_desc", path);
        let level = types.member("printk_info", "level")?;
        let (first, bits) = level.bits.unwrap_or((0, 8));
        let device = |path: &str| types.member("printk_info", &format!("dev_info.{path}"));
        let device = match (device("subsystem"), device("device")) {
            (Ok(subsystem), Ok(device)) => Some([
                (subsystem.offset, subsystem.size),
                (device.offset, device.size),
            ]),
            _ => None,
        };
        Ok(Self {
            ring: RingLayout {
                count_bits: ring("desc_ring.count_bits")?,
                descriptors: ring("desc_ring.descs")?,
                infos: ring("desc_ring.infos")?,
                newest: ring("desc_ring.head_id")?,
                oldest: ring("desc_ring.tail_id")?,
                size_bits: ring("text_data_ring.size_bits")?,
                texts: ring("text_data_ring.data")?,
            },
            descriptor: DescriptorLayout {
                size: types.size_of("prb_desc")?,
                state: descriptor("state_var")?,
                begin: descriptor("text_blk_lpos.begin")?,
                next: descriptor("text_blk_lpos.next")?,
            },
            info: InfoLayout {
                size: types.size_of("printk_info")?,
                seq: info("seq")?,
                nanoseconds: info("ts_nsec")?,
                text_len: info("text_len")?,
                facility: info("facility")?,
                level: (level.offset, first, bits),
                caller: info("caller_id")?,
                device,
            },
        })
    }
}

/// Where the rings are, and from which descriptor to which they are in use.
struct Ring<'a> {
    at: Gva,
    layout: &'a LogLayout,
    count: u64,
    descriptors: u64,
    infos: u64,
    newest: u64,
    oldest: u64,
    text_size: u64,
    texts: u64,
}

enum Found {
    /// With the bytes of its text.
    Record(Record, u64),
    Unwritten(Unwritten),
    Free,
}

impl<'a> Ring<'a> {
    fn read<R: ReadPhys + ?Sized>(
        memory: &Memory<'_, R>,
        layout: &'a LogLayout,
        pointer: Gva,
    ) -> Result<Self, LogError> {
        let at = Gva(memory.u64(pointer)?);
        let of = &layout.ring;
        let words = [of.descriptors, of.infos, of.newest, of.oldest, of.texts];
        let halves = [of.count_bits, of.size_bits];
        let fields: Vec<(u64, u64)> = words
            .map(|at| (at, 8))
            .into_iter()
            .chain(halves.map(|at| (at, 4)))
            .collect();
        let gather = Gather::new(&fields);
        let mut fields = gather.fields();
        fields.read(memory, at)?;
        let (count_bits, size_bits) = (fields.u32(of.count_bits), fields.u32(of.size_bits));
        let mut ring = Self {
            at,
            layout,
            count: 0,
            descriptors: fields.u64(of.descriptors),
            infos: fields.u64(of.infos),
            newest: fields.u64(of.newest),
            oldest: fields.u64(of.oldest),
            text_size: 0,
            texts: fields.u64(of.texts),
        };
        if count_bits > MAX_COUNT_BITS {
            return Err(ring.unsound("count of descriptors", count_bits.into()));
        }
        if !(3..=MAX_SIZE_BITS).contains(&size_bits) {
            return Err(ring.unsound("size of texts", size_bits.into()));
        }
        (ring.count, ring.text_size) = (1 << count_bits, 1 << size_bits);
        if ring.newest.wrapping_sub(ring.oldest) & NUMBER >= ring.count {
            return Err(ring.unsound("newest descriptor, too far from the oldest,", ring.newest));
        }
        Ok(ring)
    }

    fn unsound(&self, what: &'static str, value: u64) -> LogError {
        LogError::Kernel(KernelError::Unsound {
            what,
            at: self.at,
            value,
        })
    }

    fn record<R: ReadPhys + ?Sized>(
        &self,
        memory: &Memory<'_, R>,
        number: u64,
    ) -> Result<Found, LogError> {
        let index = number % self.count;
        let of = &self.layout.descriptor;
        let at = Gva(self.descriptors.wrapping_add(index * of.size));
        let word = |offset: u64| memory.u64(Gva(at.0.wrapping_add(offset)));
        let state = word(of.state)?;
        let open = match state >> STATE_SHIFT {
            // Free; if it still has the number of one round before, a writer has taken the next number and nothing else.
            3 if state & NUMBER != number => return Ok(Found::Unwritten(Unwritten::BeingReserved)),
            3 => return Ok(Found::Free),
            _ if state & NUMBER != number => {
                return Err(self.unsound("descriptor with another's number", state));
            }
            0 => return Ok(Found::Unwritten(Unwritten::BeingWritten)),
            state => state == 1,
        };
        let mut record = self.info(memory, index, open)?;
        let (begin, next) = (word(of.begin)?, word(of.next)?);
        match self.text(memory, number, (begin, next), &record)? {
            Some(text) => record.record.text = text,
            None => (record.record.lost_text, record.text_len) = (true, 0),
        }
        Ok(Found::Record(record.record, record.text_len))
    }

    /// What is known of a record beside its text.
    fn info<R: ReadPhys + ?Sized>(
        &self,
        memory: &Memory<'_, R>,
        index: u64,
        open: bool,
    ) -> Result<Info, LogError> {
        let of = &self.layout.info;
        let at = self.infos.wrapping_add(index * of.size);
        let mut bytes = vec![0; usize::try_from(of.size).unwrap_or(0)];
        memory.read(Gva(at), &mut bytes)?;
        let byte = |offset: u64| {
            let at = usize::try_from(offset).unwrap_or(usize::MAX);
            bytes.get(at).copied().unwrap_or(0)
        };
        let number = |offset: u64, len: u64| {
            (0..len)
                .rev()
                .fold(0_u64, |value, at| value << 8 | u64::from(byte(offset + at)))
        };
        let text = |(offset, len): (u64, u64)| {
            let bytes: Vec<u8> = (offset..offset + len)
                .map(byte)
                .take_while(|byte| *byte != 0)
                .collect();
            String::from_utf8_lossy(&bytes).into_owned()
        };
        let (level_at, first, bits) = of.level;
        let level = u32::from(byte(level_at)) >> first & ((1 << bits) - 1);
        let caller = u32::try_from(number(of.caller, 4)).unwrap_or(0);
        let device = of
            .device
            .map(|[subsystem, device]| (text(subsystem), text(device)));
        Ok(Info {
            text_len: number(of.text_len, 2),
            record: Record {
                seq: number(of.seq, 8),
                nanoseconds: number(of.nanoseconds, 8),
                level: u8::try_from(level).unwrap_or(u8::MAX),
                facility: byte(of.facility),
                caller: if caller & CALLER_CPU == 0 {
                    Caller::Task(caller)
                } else {
                    Caller::Cpu(caller & !CALLER_CPU)
                },
                text: String::new(),
                device: device.unwrap_or_default(),
                lost_text: false,
                open,
            },
        })
    }

    /// The text between two positions, or `None` where the kernel had no room for it.
    fn text<R: ReadPhys + ?Sized>(
        &self,
        memory: &Memory<'_, R>,
        number: u64,
        (begin, next): (u64, u64),
        info: &Info,
    ) -> Result<Option<String>, LogError> {
        if begin & next & 1 != 0 {
            return Ok((begin == EMPTY_LINE && next == EMPTY_LINE).then(String::new));
        }
        let round = |position: u64| position / self.text_size;
        let start = begin % self.text_size;
        // A block that would run over the ring's end begins anew at its start.
        let (block, len) = if next > begin && round(begin) == round(next - 1) {
            (start, next - begin)
        } else if round(begin.wrapping_add(self.text_size)) == round(next) {
            (0, next % self.text_size)
        } else {
            return Err(self.unsound("record, whose text is nowhere,", begin));
        };
        let head = self.texts.wrapping_add(block);
        let room = len
            .checked_sub(BLOCK_HEAD)
            .filter(|_| begin % 8 == 0 && next % 8 == 0);
        if room.is_none_or(|room| info.text_len > room) {
            return Err(self.unsound("record, whose text does not fit its place,", begin));
        }
        if memory.u64(Gva(head))? != number {
            return Err(self.unsound("record, whose text is another's,", begin));
        }
        let mut bytes = vec![0; usize::try_from(info.text_len).unwrap_or(0)];
        memory.read(Gva(head.wrapping_add(BLOCK_HEAD)), &mut bytes)?;
        Ok(Some(String::from_utf8_lossy(&bytes).into_owned()))
    }
}

struct Info {
    record: Record,
    text_len: u64,
}

#[cfg(test)]
mod tests;
