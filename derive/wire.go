package derive

import (
	"encoding/binary"
	"errors"
	"fmt"
)

// What crosses the socket between a broker and its keyholder. Either side sends frames: 4 octets of big-endian length, then
// that many octets. A request is one octet of operation and its arguments; an answer is one octet of status and, for
// statusOK alone, the result. Answers come in the order of the requests.
//
//	hello   -> u32 wire version, realm id 16, identity 32
//	derive  u32 generation, u32 L, info -> key L
//	sign    E(label, fields...) -> signature 64
const (
	opHello  = 1
	opDerive = 2
	opSign   = 3

	wireVersion = 1
	maxInfo     = 1 << 10
	maxLabel    = 64
	// maxRequest is the length of the longest request, its frame's length field not counted.
	maxRequest = 1 + 4 + maxLabel + maxMessage
	// maxAnswer is the same for an answer.
	maxAnswer = 128
	helloSize = 4 + RealmIDSize + 32
)

// Statuses of an answer. After statusMalformed and those above statusGeneration the keyholder ends.
const (
	statusOK         = 0
	statusMalformed  = 1
	statusRefused    = 2
	statusGeneration = 3
	statusEmptyPage  = 4
	statusForeign    = 5
	statusLockdown   = 6
	statusInternal   = 7
)

// Errors of the keyholder's start and of what crosses its socket.
var (
	// ErrLockdown means that the keyholder could not give up its rights, and therefore refused to work.
	ErrLockdown = errors.New("the keyholder could not lock itself down")

	errMalformed = errors.New("malformed request")
	errInternal  = errors.New("internal error of the keyholder, see its standard error")
)

// statusErrors is the one table of what a status means, both ways.
var statusErrors = [...]error{
	statusMalformed:  errMalformed,
	statusRefused:    ErrRefused,
	statusGeneration: ErrGeneration,
	statusEmptyPage:  ErrEmptyPage,
	statusForeign:    ErrForeignPage,
	statusLockdown:   ErrLockdown,
	statusInternal:   errInternal,
}

// statusOf returns the status that tells a client of err, which is not nil.
func statusOf(err error) byte {
	for status, e := range statusErrors {
		if e != nil && errors.Is(err, e) {
			return byte(status)
		}
	}
	return statusInternal
}

// statusError is the inverse, for the client.
func statusError(status byte) error {
	if int(status) < len(statusErrors) && statusErrors[status] != nil {
		return statusErrors[status]
	}
	return fmt.Errorf("the keyholder answered with the unknown status %d", status)
}

// request is one request, its fields in place in the frame that they came in.
type request struct {
	op         byte
	generation uint32 // derive: from 1
	length     int    // derive: L
	info       []byte // derive: accepted by checkKeyInfo
	message    []byte // sign: accepted by checkSigned
}

// appendFrame appends the request as a frame.
func (r request) appendFrame(dst []byte) []byte {
	start := len(dst)
	dst = append(dst, 0, 0, 0, 0, r.op)
	switch r.op {
	case opDerive:
		dst = binary.BigEndian.AppendUint32(dst, r.generation)
		dst = binary.BigEndian.AppendUint32(dst, uint32(r.length))
		dst = append(dst, r.info...)
	case opSign:
		dst = append(dst, r.message...)
	}
	binary.BigEndian.PutUint32(dst[start:], uint32(len(dst)-start-4))
	return dst
}

// parseRequest reads a request and is the keyholder's allow list: it fails with errMalformed for what is no request, which
// ends the keyholder, and with ErrRefused for what nobody gets.
func parseRequest(body []byte) (request, error) {
	if len(body) == 0 || len(body) > maxRequest {
		return request{}, errMalformed
	}
	args := body[1:]
	switch op := body[0]; {
	case op == opHello && len(args) == 0:
		return request{op: opHello}, nil
	case op == opDerive && len(args) >= 8 && len(args) <= 8+maxInfo:
		return parseDerive(args)
	case op == opSign:
		if err := checkSigned(args); err != nil {
			return request{}, err
		}
		return request{op: opSign, message: args}, nil
	}
	return request{}, errMalformed
}

func parseDerive(args []byte) (request, error) {
	length := binary.BigEndian.Uint32(args[4:])
	if length > 64 {
		return request{}, fmt.Errorf("%w: a key of %d octets", ErrRefused, length)
	}
	r := request{op: opDerive, generation: binary.BigEndian.Uint32(args), length: int(length), info: args[8:]}
	if err := checkKeyInfo(r.info, r.length); err != nil {
		return request{}, fmt.Errorf("%w: %w", ErrRefused, err)
	}
	return r, nil
}

// splitFrame takes the first frame from b. ok is false when it is not complete yet. A frame that is empty or longer than
// limit is an error.
func splitFrame(b []byte, limit int) (body, rest []byte, ok bool, err error) {
	if len(b) < 4 {
		return nil, b, false, nil
	}
	n := binary.BigEndian.Uint32(b)
	if n == 0 || uint64(n) > uint64(limit) {
		return nil, b, false, fmt.Errorf("%w: a frame of %d octets", errMalformed, n)
	}
	if len(b)-4 < int(n) {
		return nil, b, false, nil
	}
	return b[4 : 4+n], b[4+n:], true, nil
}

// appendAnswer appends an answer as a frame.
func appendAnswer(dst []byte, status byte, result []byte) []byte {
	dst = binary.BigEndian.AppendUint32(dst, uint32(1+len(result)))
	return append(append(dst, status), result...)
}
