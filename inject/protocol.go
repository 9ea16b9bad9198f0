// Package inject is the release protocol: how an issuer hands keys to a receiver, sealed to it and bound to one session.
//
// The issuer (the broker) serves HTTP/1.1 with strict JSON on a connection, whoever dialled it; the receiver (the guest
// agent) is the client. docs/protocol.md describes the messages octet by octet.
package inject

import (
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"

	"github.com/go-json-experiment/json"

	"keybroker/derive"
	"keybroker/internal/octet"
)

// Tiers that the protocol names, and the kinds of evidence that come with them.
const (
	TierVM  = "vm"
	TierSNP = "snp"

	KindNone = "none"
	KindSNP  = "snp-report" // a report whose REPORT_DATA is the transcript, and behind it the host's certificates, if any
)

// Port is the vsock port of both directions: below 1024, so that only root may listen on it or dial from such a one.
const Port = 720

// Limits of everything that a peer sends.
const (
	MaxBody     = 64 << 10 // octets of a request or an answer
	MaxEvidence = 40 << 10 // octets of evidence: what a request has room for beside the most keys
	MaxWant     = 64       // keys in one request
	maxHeaders  = 4 << 10  // octets of HTTP header
)

const (
	nonceSize     = 32
	receiverSize  = 1216 // HPKE public key, MLKEM768-X25519
	encSize       = 1120 // HPKE encapsulated key
	signatureSize = 64
	macSize       = 32
)

// Octets travel as base64url without padding.
type Octets = octet.Base64

// Challenge is message 2: what the issuer says first. It is unsigned; the receiver uses Issuer only if it is one of its pins.
type Challenge struct {
	Issuer  Octets   `json:"issuer"`  // Ed25519 public key, 32 octets
	Nonce   Octets   `json:"nonce"`   // 32 octets, for one release on this connection
	Subject string   `json:"subject"` // tier vm: who the issuer takes the peer for
	Offered []string `json:"offered"` // tier vm: key names in the domain's metadata
}

// Want names a key. Epoch 0 is the current one.
type Want struct {
	Name  string `json:"name"`
	Epoch uint32 `json:"epoch"`
}

// Outcome is what the receiver did with one key, as it says in its acknowledgement.
type Outcome struct {
	Name   string `json:"name"`
	Epoch  uint32 `json:"epoch"`
	Sink   string `json:"sink"`   // "luks /dev/vdb", for people
	OK     bool   `json:"ok"`     // the key is where it belongs
	Opened bool   `json:"opened"` // a volume was opened with it
}

// LUKSPins are the values that a volume's LUKS2 header must have; zero means that the receiver's own allow list decides.
type LUKSPins struct {
	Cipher     string `json:"cipher,omitzero"`      // "aes-xts-plain64"
	KeySize    int    `json:"key_size,omitzero"`    // of the volume key, bits
	SectorSize int    `json:"sector_size,omitzero"` // octets
}

type challengeRequest struct {
	Tier    string `json:"tier"`
	Subject string `json:"subject"`
}

type releaseRequest struct {
	Issuer   Octets `json:"issuer"`
	Tier     string `json:"tier"`
	Kind     string `json:"kind"`
	Subject  string `json:"subject"`
	Nonce    Octets `json:"nonce"`
	PK       Octets `json:"pk"`
	Want     []Want `json:"want"`
	Evidence Octets `json:"evidence"`
}

type releaseAnswer struct {
	Enc Octets `json:"enc"`
	CT  Octets `json:"ct"`
	Sig Octets `json:"sig"`
}

type ackRequest struct {
	Body Octets `json:"body"`
	MAC  Octets `json:"mac"`
}

type bundle struct {
	Subject string      `json:"subject"`
	Tier    string      `json:"tier"`
	Keys    []bundleKey `json:"keys"`
}

type bundleKey struct {
	Name   string    `json:"name"`
	Epoch  uint32    `json:"epoch"`
	Key    Octets    `json:"key"`
	Create bool      `json:"create"`
	LUKS   *LUKSPins `json:"luks,omitzero"`
}

// parse decodes strict JSON: unknown, repeated or mis-cased names, wrong types and bad UTF-8 are errors. The error names the
// place, and never quotes input, which may hold a key.
func parse(data []byte, v any) error {
	if len(data) > MaxBody {
		return fmt.Errorf("%d octets, expected at most %d", len(data), MaxBody)
	}
	err := json.Unmarshal(data, v, json.RejectUnknownMembers(true))
	if err == nil {
		return nil
	}
	if e := (*json.SemanticError)(nil); errors.As(err, &e) {
		if errors.Is(err, json.ErrUnknownName) {
			return errors.New("a field that the protocol does not have")
		}
		return fmt.Errorf("a value of the wrong type or form for %s", shownPointer(string(e.JSONPointer)))
	}
	return errors.New("not strict JSON: repeated names, bad UTF-8 and trailing octets are errors too")
}

// plainKind is the form of every kind of evidence: logs, the audit and status show what a stranger says here.
var plainKind = regexp.MustCompile(`^[a-z0-9-]{1,32}$`)

var plainPointer = regexp.MustCompile(`^[a-z0-9_/]+$`)

// shownPointer keeps a JSON pointer for an error only where it consists of the protocol's own plain names.
func shownPointer(p string) string {
	if len(p) > 64 || !plainPointer.MatchString(p) {
		return "the message"
	}
	return strings.TrimPrefix(p, "/")
}

// checkWant holds a list of wanted keys to the protocol: 1 to 64, sorted by name and then epoch, unique.
func checkWant(want []Want) error {
	if len(want) == 0 || len(want) > MaxWant {
		return fmt.Errorf("%d wanted keys, expected 1 to %d", len(want), MaxWant)
	}
	for i, w := range want {
		if derive.CheckKeyName(w.Name) != nil {
			return fmt.Errorf("wanted key %d has no valid name", i+1)
		}
		if i > 0 && compareWant(want[i-1], w) >= 0 {
			return errors.New("wanted keys that are not sorted and unique")
		}
	}
	return nil
}

func compareWant(a, b Want) int {
	if c := strings.Compare(a.Name, b.Name); c != 0 {
		return c
	}
	return int(int64(a.Epoch) - int64(b.Epoch))
}

// SortWant puts wanted keys in the protocol's order.
func SortWant(want []Want) { slices.SortFunc(want, compareWant) }
