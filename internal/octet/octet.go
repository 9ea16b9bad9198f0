// Package octet is octets written as text: base64url without padding or lower-case hex, each in its one canonical form.
//
// Go's decoders take more than that: encoding/base64 skips the ends of lines wherever they are, encoding/hex takes capitals.
package octet

import (
	"encoding/base64"
	"encoding/hex"
	"errors"
)

// What is wrong with a text. The errors never show it: it may be a secret.
var (
	ErrBase64 = errors.New("octets that are not base64url without padding")
	ErrHex    = errors.New("octets that are not lower-case hexadecimal digits")
)

// Base64 is octets that are base64url without padding in JSON and TOML.
type Base64 []byte

// String returns the encoding.
func (o Base64) String() string { return base64.RawURLEncoding.EncodeToString(o) }

// MarshalText returns the encoding. It never fails.
func (o Base64) MarshalText() ([]byte, error) {
	return base64.RawURLEncoding.AppendEncode(nil, o), nil
}

// UnmarshalText accepts what MarshalText writes and nothing else; all else is ErrBase64.
func (o *Base64) UnmarshalText(text []byte) error {
	octets, err := ParseBase64(string(text))
	if err != nil {
		return err
	}
	*o = octets
	return nil
}

// ParseBase64 is Base64.UnmarshalText for a text that stands by itself.
func ParseBase64(text string) (Base64, error) {
	octets, err := base64.RawURLEncoding.Strict().DecodeString(text)
	if err != nil || len(text) != base64.RawURLEncoding.EncodedLen(len(octets)) {
		return nil, ErrBase64
	}
	return octets, nil
}

// Hex is octets that are lower-case hexadecimal digits in JSON and TOML.
type Hex []byte

// String returns the digits.
func (o Hex) String() string { return hex.EncodeToString(o) }

// MarshalText returns the digits. It never fails.
func (o Hex) MarshalText() ([]byte, error) { return hex.AppendEncode(nil, o), nil }

// UnmarshalText accepts what MarshalText writes and nothing else; all else is ErrHex.
func (o *Hex) UnmarshalText(text []byte) error {
	octets, err := ParseHex(string(text))
	if err != nil {
		return err
	}
	*o = octets
	return nil
}

// ParseHex is Hex.UnmarshalText for a text that stands by itself.
func ParseHex(text string) (Hex, error) {
	octets, err := hex.DecodeString(text)
	if err != nil || hex.EncodeToString(octets) != text {
		return nil, ErrHex
	}
	return octets, nil
}
