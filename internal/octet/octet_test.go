package octet

import (
	"bytes"
	"testing"
)

// Each list of octets has one text, and whatever else a decoder might take is refused: ends of lines, padding, the other
// alphabet, bits that no octet has, capitals.
func TestCanonical(t *testing.T) {
	for _, text := range []string{"", "AA", "_-8", "AAECAw"} {
		if o, err := ParseBase64(text); err != nil || o.String() != text {
			t.Errorf("%q: %q, %v", text, o, err)
		}
	}
	for _, text := range []string{"A", "AB", "AA==", "+/8", "AAEC\nAw", "AAECAw\r\n", "\n", " AA", "AA "} {
		if o, err := ParseBase64(text); err != ErrBase64 || o != nil {
			t.Errorf("%q: %q, %v", text, o, err)
		}
	}
	for _, text := range []string{"", "00", "deadbeef"} {
		if o, err := ParseHex(text); err != nil || o.String() != text {
			t.Errorf("%q: %q, %v", text, o, err)
		}
	}
	for _, text := range []string{"0", "DEADBEEF", "dead beef", "dead\nbeef", "0x00", "zz"} {
		if o, err := ParseHex(text); err != ErrHex || o != nil {
			t.Errorf("%q: %q, %v", text, o, err)
		}
	}
}

// What is accepted is written again as it came, and what is refused changes nothing.
func FuzzParse(f *testing.F) {
	f.Add([]byte("AAECAw"))
	f.Add([]byte("AAEC\nAw"))
	f.Add([]byte("deadBEEF"))
	f.Fuzz(func(t *testing.T, text []byte) {
		before := []byte{1, 2, 3}
		b, h := Base64(before), Hex(before)
		if err := b.UnmarshalText(text); err != nil && !bytes.Equal(b, before) || err == nil && b.String() != string(text) {
			t.Errorf("base64url %q: %x, %v", text, []byte(b), err)
		}
		if err := h.UnmarshalText(text); err != nil && !bytes.Equal(h, before) || err == nil && h.String() != string(text) {
			t.Errorf("hex %q: %x, %v", text, []byte(h), err)
		}
	})
}
