//go:build linux

package sink

import (
	"bytes"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"keybroker/derive"
)

// See LUKS2 On-Disk Format Specification 1.1, section 2: two copies of a binary header of 4096 octets, each followed by a
// JSON area; then the area of the keyslots.
const (
	binarySize    = 4096
	minHeaderSize = 16 << 10 // of one copy, binary and JSON area
	maxHeaderSize = 4 << 20
	// MaxMetadata is the most that is read of a volume's metadata, keyslots and all, in octets: what cryptsetup makes.
	MaxMetadata = 16 << 20

	checksumAlgorithm = "sha256"
	tokenType         = "keybroker"
)

var (
	magicPrimary   = [6]byte{'L', 'U', 'K', 'S', 0xba, 0xbe}
	magicSecondary = [6]byte{'S', 'K', 'U', 'L', 0xba, 0xbe}
)

// binaryHeader is the header's first part, as it lies on the disk, big-endian.
type binaryHeader struct {
	Magic     [6]byte
	Version   uint16
	Size      uint64 // of this copy, JSON area included
	Sequence  uint64
	Label     [48]byte
	Algorithm [32]byte
	Salt      [64]byte
	UUID      [40]byte
	Subsystem [48]byte
	Offset    uint64 // of this copy on the device
	_         [184]byte
	Checksum  [64]byte
	_         [7 * 512]byte
}

const checksumAt = 0x1c0

// metadata is the whole of the JSON area that this program understands; any further member is an error.
type metadata struct {
	Keyslots map[string]keyslot        `json:"keyslots"`
	Tokens   map[string]jsontext.Value `json:"tokens"`
	Segments map[string]segment        `json:"segments"`
	Digests  map[string]digest         `json:"digests"`
	Config   config                    `json:"config"`
}

type keyslot struct {
	Type    string `json:"type"`
	KeySize int    `json:"key_size"` // octets
	AF      struct {
		Type    string `json:"type"`
		Stripes int    `json:"stripes"`
		Hash    string `json:"hash"`
	} `json:"af"`
	Area area `json:"area"`
	KDF  kdf  `json:"kdf"`
}

type area struct {
	Type       string `json:"type"`
	Offset     uint64 `json:"offset,string"`
	Size       uint64 `json:"size,string"`
	Encryption string `json:"encryption"`
	KeySize    int    `json:"key_size"` // octets
}

type kdf struct {
	Type       string `json:"type"`
	Hash       string `json:"hash,omitzero"`       // pbkdf2
	Iterations int64  `json:"iterations,omitzero"` // pbkdf2
	Time       int64  `json:"time,omitzero"`       // argon2id
	Memory     int64  `json:"memory,omitzero"`     // argon2id, KiB
	CPUs       int64  `json:"cpus,omitzero"`       // argon2id
	Salt       []byte `json:"salt"`
}

type segment struct {
	Type       string   `json:"type"`
	Offset     uint64   `json:"offset,string"`
	Size       string   `json:"size"`
	IVTweak    uint64   `json:"iv_tweak,string"`
	Encryption string   `json:"encryption"`
	SectorSize int      `json:"sector_size"`
	Flags      []string `json:"flags,omitzero"`
}

type digest struct {
	Type       string   `json:"type"`
	Keyslots   []string `json:"keyslots"`
	Segments   []string `json:"segments"`
	Hash       string   `json:"hash"`
	Iterations int64    `json:"iterations"`
	Salt       []byte   `json:"salt"`
	Digest     []byte   `json:"digest"`
}

type config struct {
	JSONSize     uint64         `json:"json_size,string"`
	KeyslotsSize uint64         `json:"keyslots_size,string"`
	Flags        []string       `json:"flags,omitzero"`
	Requirements map[string]any `json:"requirements,omitzero"`
}

// token is what this program leaves in a volume: which key and epoch opens which keyslot. The host can rewrite it, so it
// serves against mistakes and not against the host.
type token struct {
	Type     string   `json:"type"`
	Keyslots []string `json:"keyslots"`
	Name     string   `json:"name"`
	Epoch    uint32   `json:"epoch"`
	Subject  string   `json:"subject,omitzero"`
}

// header is a LUKS2 header whose form was read whole; check says whether it is one to be used.
type header struct {
	size     uint64 // of one copy
	sequence uint64
	uuid     string
	salt     [64]byte
	meta     metadata
	tokens   map[string]token
}

// refuse makes an ErrHeader. What it shows of the disk is quoted and bounded by the caller's verbs.
func refuse(format string, args ...any) error {
	return fmt.Errorf("%w: %w", ErrHeader, fmt.Errorf(format, args...))
}

// errNoHeader: nothing at this place that calls itself a LUKS header.
var errNoHeader = errors.New("no LUKS header here")

// headerSizes are those that the specification allows, and so the places where a second copy can be.
func headerSizes() []uint64 {
	var sizes []uint64
	for n := uint64(minHeaderSize); n <= maxHeaderSize; n *= 2 {
		sizes = append(sizes, n)
	}
	return sizes
}

// readHeader reads both copies of the header from r and returns the one that holds: the newer, if both do. It returns
// errNoHeader where there is neither, and an ErrHeader where neither holds, or both hold and contradict each other.
func readHeader(r io.ReaderAt) (*header, error) {
	first, firstErr := readCopy(r, 0, magicPrimary)
	second, secondErr := readSecond(r, first)
	switch {
	case firstErr == nil && secondErr == nil:
		return newer(first, second)
	case firstErr == nil:
		return first, nil
	case secondErr == nil:
		return second, nil
	case errors.Is(firstErr, errNoHeader):
		return nil, secondErr
	}
	return nil, firstErr
}

// readSecond reads the second copy: where the first says, or, without a first, at any of the places where it can be.
func readSecond(r io.ReaderAt, first *header) (*header, error) {
	if first != nil {
		return readCopy(r, first.size, magicSecondary)
	}
	worst := errNoHeader
	for _, at := range headerSizes() {
		h, err := readCopy(r, at, magicSecondary)
		if err == nil {
			return h, nil
		}
		if !errors.Is(err, errNoHeader) {
			worst = err
		}
	}
	return nil, worst
}

// newer picks one of two copies that both hold. Between the two writes of an update the numbers differ by one; equal numbers
// mean equal content.
func newer(a, b *header) (*header, error) {
	if a.size != b.size || a.uuid != b.uuid {
		return nil, refuse("its two copies are of different volumes")
	}
	if a.sequence == b.sequence {
		x, y := a.json(), b.json()
		if !bytes.Equal(x, y) {
			return nil, refuse("its two copies say different things under the same number")
		}
	}
	if b.sequence > a.sequence {
		return b, nil
	}
	return a, nil
}

// readCopy reads the copy of the header at an offset.
func readCopy(r io.ReaderAt, at uint64, magic [6]byte) (*header, error) {
	raw := make([]byte, binarySize)
	if _, err := r.ReadAt(raw, int64(at)); err != nil {
		return nil, errNoHeader // the device ends before
	}
	var b binaryHeader
	if _, err := binary.Decode(raw, binary.BigEndian, &b); err != nil || b.Magic != magic {
		return nil, errNoHeader
	}
	if err := b.check(at); err != nil {
		return nil, err
	}
	text := make([]byte, b.Size-binarySize)
	if _, err := r.ReadAt(text, int64(at)+binarySize); err != nil {
		return nil, refuse("its metadata goes on beyond the device's end")
	}
	if sum := checksum(raw, text); subtle.ConstantTimeCompare(sum, b.Checksum[:sha256.Size]) != 1 {
		return nil, refuse("its checksum does not fit its content")
	}
	return parseHeader(&b, text)
}

// check holds the binary part to the allow list.
func (b *binaryHeader) check(at uint64) error {
	switch {
	case b.Version == 1:
		return refuse("it is LUKS1, expected LUKS2; `cryptsetup convert --type luks2` makes one of it")
	case b.Version != 2:
		return refuse("it is of version %d, expected 2", b.Version)
	case !slices.Contains(headerSizes(), b.Size):
		return refuse("it says that it is %d octets long, which LUKS2 does not allow", b.Size)
	case b.Offset != at:
		return refuse("it says that it is at %d and is at %d", b.Offset, at)
	case cString(b.Algorithm[:]) != checksumAlgorithm:
		return refuse("its checksum is %q, expected %q", cString(b.Algorithm[:]), checksumAlgorithm)
	case derive.CheckSubject(cString(b.UUID[:])) != nil:
		return refuse("its UUID is %q, expected one in lower case", cString(b.UUID[:]))
	}
	return nil
}

func cString(b []byte) string {
	text, _, _ := bytes.Cut(b, []byte{0})
	return string(text)
}

func checksum(raw, text []byte) []byte {
	h := sha256.New()
	h.Write(raw[:checksumAt])
	h.Write(make([]byte, 64))
	h.Write(raw[checksumAt+64:])
	h.Write(text)
	return h.Sum(nil)
}

// parseHeader reads the JSON area: strict JSON of known members, then zeros.
func parseHeader(b *binaryHeader, text []byte) (*header, error) {
	document, rest, _ := bytes.Cut(text, []byte{0})
	if len(bytes.Trim(rest, "\x00")) > 0 {
		return nil, refuse("its metadata area holds more than metadata")
	}
	h := &header{size: b.Size, sequence: b.Sequence, uuid: cString(b.UUID[:]), salt: b.Salt, tokens: map[string]token{}}
	if err := json.Unmarshal(document, &h.meta, json.RejectUnknownMembers(true)); err != nil {
		return nil, refuse("its metadata has a member, a value or a form that is not expected%s", place(err))
	}
	for id, raw := range h.meta.Tokens {
		t, err := parseToken(raw)
		if err != nil {
			return nil, refuse("token %q: %w", short(id), err)
		}
		h.tokens[id] = t
	}
	return h, nil
}

func parseToken(raw jsontext.Value) (token, error) {
	var kind struct {
		Type string `json:"type"`
	}
	if err := json.Unmarshal(raw, &kind); err != nil {
		return token{}, errors.New("not an object with a type")
	}
	if kind.Type != tokenType {
		return token{}, fmt.Errorf("it is of type %q, expected only %q", short(kind.Type), tokenType)
	}
	var t token
	if err := json.Unmarshal(raw, &t, json.RejectUnknownMembers(true)); err != nil {
		return token{}, errors.New("not of the form that keybroker writes")
	}
	return t, nil
}

// place names where in the metadata an error lies.
func place(err error) string {
	if e := (*json.SemanticError)(nil); errors.As(err, &e) && e.JSONPointer != "" {
		return fmt.Sprintf(", at %q", short(string(e.JSONPointer)))
	}
	if e := (*jsontext.SyntacticError)(nil); errors.As(err, &e) && e.JSONPointer != "" {
		return fmt.Sprintf(", at %q", short(string(e.JSONPointer)))
	}
	return ""
}

// short bounds what is shown of a disk's content; %q makes it printable.
func short(s string) string {
	if len(s) > 64 {
		return s[:64] + "..."
	}
	return s
}

// json renders the metadata as it was understood, and nothing else.
func (h *header) json() []byte {
	meta := h.meta
	meta.Tokens = map[string]jsontext.Value{}
	for id, t := range h.tokens {
		meta.Tokens[id] = must(json.Marshal(t))
	}
	return must(json.Marshal(&meta, json.Deterministic(true)))
}

// must: our own types always encode.
func must(b []byte, err error) []byte {
	if err != nil {
		panic(fmt.Sprintf("sink: encoding a header: %v", err))
	}
	return b
}

// copyAt renders one copy of the header, binary part and JSON area, from what was understood of it: no octet of the disk that
// was not looked at is in it.
func (h *header) copyAt(at uint64) ([]byte, error) {
	b := binaryHeader{Magic: magicPrimary, Version: 2, Size: h.size, Sequence: h.sequence, Salt: h.salt, Offset: at}
	if at != 0 {
		b.Magic = magicSecondary
	}
	copy(b.Algorithm[:], checksumAlgorithm)
	copy(b.UUID[:], h.uuid)
	out := make([]byte, h.size)
	document := h.json()
	if len(document) >= len(out)-binarySize {
		return nil, fmt.Errorf("metadata of %d octets does not fit its area", len(document))
	}
	copy(out[binarySize:], document)
	if _, err := binary.Encode(out, binary.BigEndian, &b); err != nil {
		return nil, fmt.Errorf("encoding a header: %w", err)
	}
	copy(out[checksumAt:], checksum(out[:binarySize], out[binarySize:]))
	return out, nil
}

// metadataSize is where the keyslots' area ends, in octets from the start.
func (h *header) metadataSize() uint64 { return 2*h.size + h.meta.Config.KeyslotsSize }

// newestToken returns the id and token with the highest epoch, or "" where there is none.
func (h *header) newestToken() (string, token) {
	var best string
	for id, t := range h.tokens {
		if best == "" || t.Epoch > h.tokens[best].Epoch {
			best = id
		}
	}
	return best, h.tokens[best]
}

// tokenOfEpoch returns the token of one epoch.
func (h *header) tokenOfEpoch(epoch uint32) (string, token, bool) {
	for id, t := range h.tokens {
		if t.Epoch == epoch {
			return id, t, true
		}
	}
	return "", token{}, false
}

// freeToken is the lowest token number that is free.
func (h *header) freeToken() string {
	for n := 0; ; n++ {
		id := strconv.Itoa(n)
		if _, taken := h.tokens[id]; !taken {
			return id
		}
	}
}
