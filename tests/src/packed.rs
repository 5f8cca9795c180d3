//! Files of a guest that come over its serial line: packed, for each byte costs an exit, and as digits, for the line is made for text.

use std::io::Read as _;

use flate2::read::GzDecoder;

/// The shell command that prints the file at `path`.
#[must_use]
pub fn command(path: &str) -> String {
    format!(r#"gzip -c {path} | hexdump -v -e '60/1 "%02x" "\n"'"#)
}

/// What the file held of which the command printed `digits`.
///
/// # Errors
/// When it came damaged.
pub fn unpack(digits: &str) -> std::io::Result<String> {
    let mut text = String::new();
    GzDecoder::new(from_hex(digits).as_slice()).read_to_string(&mut text)?;
    Ok(text)
}

/// Bytes from their hexadecimal digits.
fn from_hex(text: &str) -> Vec<u8> {
    let digits = text.chars().filter_map(|digit| digit.to_digit(16));
    let digits: Vec<u8> = digits.filter_map(|digit| digit.try_into().ok()).collect();
    let pairs = digits.as_chunks::<2>().0.iter();
    pairs.map(|[high, low]| high << 4 | low).collect()
}

#[cfg(test)]
mod tests {
    use super::from_hex;

    #[test]
    fn digits_are_bytes_wherever_lines_end() {
        assert_eq!(from_hex("001f\n8bff \n"), [0, 0x1f, 0x8b, 0xff]);
    }
}
