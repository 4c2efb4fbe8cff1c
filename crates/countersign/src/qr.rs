//! A QR code in a terminal: what an authenticator app reads with its camera, so that nobody types a secret. What it says stands
//! beside it as text.

use std::io::IsTerminal;

use qrcode::{QrCode, render::unicode::Dense1x2};

/// White on black, whatever the colours of the terminal are: a camera needs the light modules to be light.
const COLOURS: &str = "\u{1b}[97;40m";
const RESET: &str = "\u{1b}[0m";

/// `text` for a camera, when a person sits before standard output.
pub fn for_terminal(text: &str) -> String {
    if !std::io::stdout().is_terminal() {
        return String::new();
    }
    drawn(text).lines().map(|line| format!("{COLOURS}{line}{RESET}\n")).collect()
}

/// Two modules above each other in one character; nothing when it is too long for any code.
fn drawn(text: &str) -> String {
    let Ok(code) = QrCode::new(text) else { return String::new() };
    // What is drawn is light.
    code.render::<Dense1x2>().dark_color(Dense1x2::Light).light_color(Dense1x2::Dark).build()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_is_drawn_with_a_light_border_all_around() {
        let drawn =
            drawn("otpauth://totp/shop.example:alice?secret=JBSWY3DPEHPK3PXPJBSWY3DPEHPK3PXP&issuer=shop.example");
        let lines: Vec<Vec<char>> = drawn.lines().map(|line| line.chars().collect()).collect();
        let width = lines[0].len();
        assert!((29..=65).contains(&width) && lines.len() == width.div_ceil(2), "{width} by {}", lines.len());
        // An odd number of rows leaves the lower half of the last line undrawn.
        let is_light = |modules: &[char]| modules.iter().all(|module| matches!(module, '█' | '▀'));
        assert!(lines[..2].iter().flatten().all(|module| *module == '█'), "{drawn}");
        assert!(lines.iter().all(|line| line.len() == width && is_light(&line[..4]) && is_light(&line[width - 4..])));
        assert_eq!(super::drawn(&"x".repeat(3_000)), "");
    }
}
