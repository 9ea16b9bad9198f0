package inject

import (
	"crypto/ed25519"
	"crypto/hmac"
	"crypto/hpke"
	"crypto/sha256"
	"crypto/sha512"
	"errors"
	"fmt"

	"github.com/go-json-experiment/json"

	"keybroker/derive"
	"keybroker/internal/tuple"
)

// Labels of what is hashed, sealed and authenticated. DO NOT CHANGE.
const (
	labelSession = "keybroker/v1 session"
	labelSeal    = "keybroker/v1 seal"
	labelAck     = "keybroker/v1 ack"
)

// Transcript is T, the digest of everything that one session agrees on.
type Transcript [sha512.Size]byte

// transcriptFields are what T is the digest of, in its order.
type transcriptFields struct {
	issuer  ed25519.PublicKey
	tier    string
	kind    string
	subject string
	nonce   []byte
	pk      []byte
	want    []Want
}

// transcript computes T = SHA-512(E("keybroker/v1 session", issuer, tier, kind, subject, nonce, pk, want)).
func (s *transcriptFields) transcript() Transcript {
	var want []byte
	for _, w := range s.want {
		want = append(want, tuple.Encode([]byte(w.Name), tuple.Uint32(w.Epoch))...)
	}
	return sha512.Sum512(tuple.Encode([]byte(labelSession), s.issuer, []byte(s.tier), []byte(s.kind), []byte(s.subject),
		s.nonce, s.pk, want))
}

// The suite that "v1" stands for: HPKE base mode, MLKEM768-X25519, HKDF-SHA256, AES-256-GCM. See RFC 9180, section 5.1.1.
func kem() hpke.KEM   { return hpke.MLKEM768X25519() }
func kdf() hpke.KDF   { return hpke.HKDFSHA256() }
func aead() hpke.AEAD { return hpke.AES256GCM() }

func sealInfo(t Transcript) []byte { return tuple.Encode([]byte(labelSeal), t[:]) }

// seal encrypts a bundle to the receiver pk within session t, and gives the key that its acknowledgement is authenticated with.
func seal(pk []byte, t Transcript, plain []byte) (enc, ct, ackKey []byte, err error) {
	public, err := kem().NewPublicKey(pk)
	if err != nil {
		return nil, nil, nil, fmt.Errorf("reading the receiver's public key: %w", err)
	}
	enc, sender, err := hpke.NewSender(public, kdf(), aead(), sealInfo(t))
	if err != nil {
		return nil, nil, nil, fmt.Errorf("encapsulating: %w", err)
	}
	if ct, err = sender.Seal(nil, plain); err != nil {
		return nil, nil, nil, fmt.Errorf("sealing: %w", err)
	}
	if ackKey, err = sender.Export(labelAck, macSize); err != nil {
		return nil, nil, nil, fmt.Errorf("exporting the acknowledgement key: %w", err)
	}
	return enc, ct, ackKey, nil
}

// errNotOpened is all that is said of an answer that does not open.
var errNotOpened = errors.New("the sealed answer does not open with this receiver's key in this session")

// open is seal's other side. It says nothing of why it failed.
func open(sk hpke.PrivateKey, t Transcript, enc, ct []byte) (plain, ackKey []byte, err error) {
	recipient, err := hpke.NewRecipient(enc, sk, kdf(), aead(), sealInfo(t))
	if err != nil {
		return nil, nil, errNotOpened
	}
	if plain, err = recipient.Open(nil, ct); err != nil {
		return nil, nil, errNotOpened
	}
	if ackKey, err = recipient.Export(labelAck, macSize); err != nil {
		return nil, nil, errNotOpened
	}
	return plain, ackKey, nil
}

func ackMAC(ackKey []byte, t Transcript, body []byte) []byte {
	h := hmac.New(sha256.New, ackKey)
	h.Write(tuple.Encode([]byte(labelAck), t[:], body))
	return h.Sum(nil)
}

// signed is what the issuer's identity signs: E(derive.LabelRelease, T, enc, ct).
func signed(t Transcript, enc, ct []byte) []byte {
	return tuple.Encode([]byte(derive.LabelRelease), t[:], enc, ct)
}

func marshal(v any) []byte {
	b, err := json.Marshal(v)
	if err != nil {
		panic(fmt.Sprintf("inject: encoding %T: %v", v, err)) // our own types always encode
	}
	return b
}
