-- Consumes from all rate limits of a key, or from none if any refuses. Computes the GCRA of domain/limit.rs to the
-- same unit.
--
-- KEYS: one per limit; then one for the request's ID, if it has one.
-- ARGV: the time in microseconds ('' = this server's clock), the cost, '1' to consume nothing; then, per limit, its
--       units and its window in microseconds.
-- Returns: 1 if the ID was seen before; then, per limit, the units in use before this request: whole units, and the
--       fraction of one more in microseconds of the window.
--
-- Numbers are doubles, exact up to 2^53. So the units in use are kept in two parts, and no product exceeds that:
-- a window is at most 2^37 microseconds, a limit at most 2^30 units.

local SHARE = 32768
local REMEMBERED_MS = 2000
-- How much longer than necessary a state is kept.
local SPARE_MS = 60000

local now = tonumber(ARGV[1])
if not now then
    local time = redis.call('TIME')
    now = tonumber(time[1]) * 1000000 + tonumber(time[2])
end
local cost = tonumber(ARGV[2])
local count = (#ARGV - 3) / 2
local number = KEYS[count + 1]
local again = 0
if number and redis.call('EXISTS', number) == 1 then
    again = 1
end

local function divide(a, b)
    local quotient = math.floor(a / b)
    local rest = a - quotient * b
    if rest < 0 then
        return quotient - 1, rest + b
    elseif rest >= b then
        return quotient + 1, rest - b
    end
    return quotient, rest
end

-- The units that come back in a time that is shorter than the window.
local function regained(time, units, window)
    local high = math.floor(units / SHARE)
    local whole, part = divide(time * high, window)
    local more, rest = divide(part * SHARE, window)
    local last, remains = divide(time * (units - high * SHARE) + rest, window)
    return whole * SHARE + more + last, remains
end

local reply, states, allowed = { again }, {}, true
for i = 1, count do
    local units, window = tonumber(ARGV[2 + 2 * i]), tonumber(ARGV[3 + 2 * i])
    local whole, part = 0, 0
    local at, known, rest = string.match(redis.call('GET', KEYS[i]) or '', '^(%d+) (%d+) (%d+)$')
    if at then
        local time = now - tonumber(at)
        whole, part = tonumber(known), tonumber(rest)
        if time >= window then
            whole, part = 0, 0
        elseif time >= 0 then
            local back, piece = regained(time, units, window)
            whole, part = whole - back, part - piece
            if part < 0 then
                whole, part = whole - 1, part + window
            end
            if whole < 0 then
                whole, part = 0, 0
            end
        else
            -- The clock was set back: the limit is full again at the same instant as before, after one window at most.
            local back, piece = units, 0
            if -time < window then
                back, piece = regained(-time, units, window)
            end
            whole, part = whole + back, part + piece
            if part >= window then
                whole, part = whole + 1, part - window
            end
            if whole >= units then
                whole, part = units, 0
            end
        end
    end
    allowed = allowed and (whole + cost < units or (whole + cost == units and part == 0))
    reply[2 * i], reply[2 * i + 1] = whole, part
    states[i] = { whole + cost, part, math.ceil((whole + cost + 1) * window / units / 1000) + SPARE_MS }
end

if allowed and again == 0 and ARGV[3] ~= '1' then
    for i = 1, count do
        local state = states[i]
        local text = string.format('%.0f %.0f %.0f', now, state[1], state[2])
        redis.call('SET', KEYS[i], text, 'PX', string.format('%.0f', state[3]))
    end
    if number then
        redis.call('SET', number, '1', 'PX', REMEMBERED_MS)
    end
end
return reply
